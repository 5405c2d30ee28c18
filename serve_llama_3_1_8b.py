# serve_llama_3_1_8b.py
import os

from ray.serve.llm import LLMConfig, build_openai_app

llm_config = LLMConfig(
    model_loading_config=dict(
        model_id="my-llama-3.1-8b",
        # A Hugging Face id or a local folder. unsloth/Meta-Llama-3.1-8B-Instruct is an ungated copy.
        model_source=os.environ.get("MODEL_SOURCE", "meta-llama/Llama-3.1-8B-Instruct"),
    ),
    # Unset, any GPU will do. On a cluster with several types, name one: L4, A10G, H100, ...
    accelerator_type=os.environ.get("ACCELERATOR_TYPE"),
    deployment_config=dict(
        autoscaling_config=dict(
            min_replicas=1,
            max_replicas=2,
            # Without a target, Ray Serve LLM never adds a replica, whatever max_replicas says.
            target_ongoing_requests=64,
            upscale_delay_s=10,
            downscale_delay_s=300,
        ),
    ),
    engine_kwargs=dict(max_model_len=8192),
)
app = build_openai_app({"llm_configs": [llm_config]})
