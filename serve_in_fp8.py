# serve_in_fp8.py
from ray.serve.llm import build_openai_app

from serve_llama_3_1_8b import llm_config

llm_config.engine_kwargs.update(quantization="fp8_per_channel")  # On the A10G and the A100, "fp8"
app = build_openai_app({"llm_configs": [llm_config]})
