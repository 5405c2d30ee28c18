# serve_llama_3_1_8b.py
import os

from ray.serve.llm import LLMConfig, build_openai_app

# A Hugging Face id or a local folder. unsloth/Meta-Llama-3.1-8B-Instruct is an ungated copy.
model_source = os.environ.get("MODEL_SOURCE", "meta-llama/Llama-3.1-8B-Instruct")
pinned = {"meta-llama/Llama-3.1-8B-Instruct": "0e9e39f249a16976918f6564b8830bc894c89659"}

llm_config = LLMConfig(
    model_loading_config=dict(model_id="my-llama-3.1-8b", model_source=model_source),
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
        # What each replica admits, and how many more wait for it. Any others are told at once to come back later.
        max_ongoing_requests=256,
        max_queued_requests=64,
        backpressure_config=dict(status_code=429, retry_after_s=5),
        health_check_period_s=2,
        graceful_shutdown_timeout_s=120,  # What answers under way have to finish. HAProxy gives them no more.
    ),
    # With its commit pinned, the repository's owner can't change the weights under you.
    engine_kwargs=dict(max_model_len=8192, revision=pinned.get(model_source)),
)
app = build_openai_app({"llm_configs": [llm_config]})
