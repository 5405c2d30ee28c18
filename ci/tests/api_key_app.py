"""The tiny app, asking for the key in API_KEY."""

from ray.serve.llm import LLMConfig, build_openai_app

from api_key import require_key
from tiny_llama.app import llm_config

settings = llm_config.model_dump(exclude_unset=True)
settings["engine_kwargs"] |= {"middleware": require_key(), "allowed_origins": ["https://chat.example.com"]}
app = build_openai_app({"llm_configs": [LLMConfig(**settings)]})
