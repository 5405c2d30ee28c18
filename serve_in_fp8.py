# serve_in_fp8.py
from ray.serve.llm import LLMConfig, build_openai_app

from serve_with_tools import llm_config

settings = llm_config.model_dump(exclude_unset=True)
settings["engine_kwargs"]["quantization"] = "fp8_per_channel"  # On older GPUs than the L4, such as the A10G: "fp8"
llm_config = LLMConfig(**settings)
app = build_openai_app({"llm_configs": [llm_config]})
