"""The tutorial's app with a variant's changes, taken from the environment that benchmarks/run.py sets."""

import importlib
import json
import os

from ray.serve.llm import LLMConfig, build_openai_app


def variant_settings() -> dict:
    """The settings of LLMConfig: those of the module BENCHMARK_BASE, with the changes of BENCHMARK_CHANGES (JSON)."""
    settings = importlib.import_module(os.environ["BENCHMARK_BASE"]).llm_config.model_dump(exclude_unset=True)
    for name, value in json.loads(os.environ["BENCHMARK_CHANGES"]).items():
        settings[name] = {**settings.get(name, {}), **value}
    del settings["deployment_config"]["autoscaling_config"]
    settings["deployment_config"]["num_replicas"] = 1  # Under any load
    return settings


if "BENCHMARK_BASE" in os.environ:
    ingress = json.loads(os.environ["BENCHMARK_INGRESS"])
    app = build_openai_app(
        {"llm_configs": [LLMConfig(**variant_settings())]} | ({"ingress_deployment_config": ingress} if ingress else {})
    )
