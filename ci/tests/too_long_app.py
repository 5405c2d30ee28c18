"""An app that can't start: the tiny model with a context whose KV cache exceeds the memory for it."""

from ray.serve.llm import build_openai_app

from tiny_llama.app import llm_config

llm_config.engine_kwargs["max_model_len"] = 2_000_000
llm_config.runtime_env["env_vars"]["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
app = build_openai_app({"llm_configs": [llm_config]})
