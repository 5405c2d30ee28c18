"""The tiny app with room for one adapter, and with tools: both go into one app."""

from ray.serve.llm import build_openai_app

import serve_with_tools
from serve_with_adapters import llm_config
from tiny_llama.app import shrunk

llm_config.lora_config.max_num_adapters_per_replica = 1
llm_config.engine_kwargs |= serve_with_tools.llm_config.engine_kwargs | {"max_loras": 1, "max_cpu_loras": 1}
app = build_openai_app({"llm_configs": [shrunk(llm_config)]})
