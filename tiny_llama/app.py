"""The tutorial's app, shrunk to serve the tiny model on CPUs: `serve run tiny_llama.app:app`."""

from ray.serve.llm import LLMConfig, build_openai_app

from serve_llama_3_1_8b import llm_config as gpu_config
from tiny_llama.make_model import MODEL_DIR


def shrunk(config: LLMConfig) -> LLMConfig:
    """`config` with the tiny model, on CPUs."""
    settings = config.model_dump(exclude_unset=True)
    settings["model_loading_config"]["model_source"] = str(MODEL_DIR)
    settings.pop("accelerator_type", None)
    settings["accelerator_config"] = {"kind": "cpu"}
    settings["engine_kwargs"] |= {"enforce_eager": True, "revision": None}
    # Short delays, so that a short run shows the autoscaler at work. The sweep's loads are shorter.
    settings["deployment_config"]["autoscaling_config"] |= {"upscale_delay_s": 40, "downscale_delay_s": 30}
    settings["runtime_env"] = {"env_vars": {"VLLM_CPU_KVCACHE_SPACE": "1"}}
    return LLMConfig(**settings)


llm_config = shrunk(gpu_config)
app = build_openai_app({"llm_configs": [llm_config]})
