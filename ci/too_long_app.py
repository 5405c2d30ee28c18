"""An app that can't start: the tiny model with a longer context than its position embeddings allow."""

from ray.serve.llm import LLMConfig, build_openai_app

from tiny_llama.app import settings

settings["engine_kwargs"]["max_model_len"] = 1_000_000
app = build_openai_app({"llm_configs": [LLMConfig(**settings)]})
