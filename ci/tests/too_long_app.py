"""An app that can't start: the tiny model with a context whose KV cache exceeds the memory for it."""

from ray.serve.llm import LLMConfig, build_openai_app

from tiny_llama.app import llm_config

settings = llm_config.model_dump(exclude_unset=True)
settings["engine_kwargs"]["max_model_len"] = 2_000_000
# One start in place of three: the others would fail alike.
settings["deployment_config"]["max_constructor_retry_count"] = 1
settings["runtime_env"]["env_vars"]["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
app = build_openai_app({"llm_configs": [LLMConfig(**settings)]})
