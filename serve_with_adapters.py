# serve_with_adapters.py
import os

from ray.serve.llm import LLMConfig, build_openai_app

from serve_llama_3_1_8b import llm_config

settings = llm_config.model_dump(exclude_unset=True)
settings["lora_config"] = dict(
    dynamic_lora_loading_path=os.environ["ADAPTERS"],  # Such as s3://my-bucket/adapters
    max_num_adapters_per_replica=16,
)
settings["engine_kwargs"] |= dict(
    enable_lora=True,
    max_loras=4,  # Adapters in one batch
    max_cpu_loras=16,  # Adapters in memory. A new one replaces the one that was used longest ago.
    max_lora_rank=16,  # The largest "r" of any adapter_config.json
)
llm_config = LLMConfig(**settings)
app = build_openai_app({"llm_configs": [llm_config]})
