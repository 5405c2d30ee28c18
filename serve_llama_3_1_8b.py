# serve_llama_3_1_8b.py
import os

from ray.serve.llm import LLMConfig, build_openai_app

model_source = os.environ.get("MODEL_SOURCE", "meta-llama/Llama-3.1-8B-Instruct")  # Or a local folder
commits = {
    "meta-llama/Llama-3.1-8B-Instruct": "0e9e39f249a16976918f6564b8830bc894c89659",
    "unsloth/Meta-Llama-3.1-8B-Instruct": "a2856192dd7c25b842431f39c179a6c2c2f627d1",
}
target = int(os.environ.get("TARGET_ONGOING_REQUESTS", "64"))  # Per replica, for the autoscaler

llm_config = LLMConfig(
    model_loading_config=dict(model_id="my-llama-3.1-8b", model_source=model_source),
    accelerator_type=os.environ.get("ACCELERATOR_TYPE"),  # Unset, any GPU will do.
    deployment_config=dict(
        autoscaling_config=dict(min_replicas=1, max_replicas=2, target_ongoing_requests=target, downscale_delay_s=300),
        max_ongoing_requests=256,
        max_queued_requests=256,
        backpressure_config=dict(status_code=429, retry_after_s=5),
        health_check_period_s=2,
        graceful_shutdown_timeout_s=120,
    ),
    engine_kwargs=dict(
        max_model_len=8192,
        stream_interval=8,  # Tokens in a chunk of a stream, after the first
        revision=commits.get(model_source),
        structured_outputs_config=dict(backend="xgrammar"),
        allowed_origins=[],
    ),
)
app = build_openai_app({"llm_configs": [llm_config]})
