"""The tiny app, asking for the key in API_KEY."""

from ray.serve.llm import LLMConfig, build_openai_app

from tiny_llama.app import settings

settings["engine_kwargs"]["middleware"] = ["api_key.RequireKey"]
app = build_openai_app({"llm_configs": [LLMConfig(**settings)]})
