"""The app in FP8, shrunk. The engine for CPUs can't compute in FP8, so this one computes in 32 bits."""

from ray.serve.llm import build_openai_app

from serve_in_fp8 import llm_config
from tiny_llama.app import shrunk

del llm_config.engine_kwargs["quantization"]
llm_config.engine_kwargs["dtype"] = "float32"
app = build_openai_app({"llm_configs": [shrunk(llm_config)]})
