# serve_with_adapters.py
import os

from ray.serve.llm import LoraConfig, build_openai_app

from serve_llama_3_1_8b import llm_config

llm_config.lora_config = LoraConfig(
    dynamic_lora_loading_path=os.environ["ADAPTERS"],  # Such as s3://my-bucket/adapters
    max_num_adapters_per_replica=16,  # In memory. The one that was used longest ago makes room.
)
llm_config.engine_kwargs.update(enable_lora=True, max_loras=4, max_lora_rank=16)  # In one batch; the largest rank
app = build_openai_app({"llm_configs": [llm_config]})
