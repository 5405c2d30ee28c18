"""Deploy the tutorial's app with a variant's changes on the Ray at RAY_ADDRESS: `python -m benchmarks.app PORT`.

BENCHMARK in the environment (JSON) says which: {"base": module, "llm_config": changes, "router_hop": bool}.
`python -m benchmarks.app settings` prints the resulting settings of LLMConfig for a list of such questions instead.
"""

import importlib
import json
import os
import sys
import time

import ray
from ray import serve
from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.serve.llm import LLMConfig, LLMServer, build_llm_deployment, build_openai_app

from benchmarks.variants import merged


class NoNodeInit(CallbackBase):
    """Leaves the download of the weights to the engine, in place of a task on each of its nodes."""

    async def on_before_node_init(self) -> None:
        self.ctx.run_init_node = False


def changed_settings(base: str, changes: dict) -> dict:
    """The settings of LLMConfig in the module `base` with `changes`, and one replica in the autoscaler's place."""
    settings = merged(importlib.import_module(base).llm_config.model_dump(exclude_unset=True), changes)
    settings["deployment_config"].pop("autoscaling_config", None)
    settings["deployment_config"].setdefault("num_replicas", 1)
    return settings


def build(settings: dict, router_hop: bool) -> serve.Application:
    """The app as the tutorial builds it. Without the router's hop, HAProxy picks the replica by itself."""
    llm_config = LLMConfig(**settings)
    if router_hop:
        return build_openai_app({"llm_configs": [llm_config]})
    return build_llm_deployment(llm_config, deployment_cls=serve.ingress()(LLMServer))


def connect(timeout_s: float = 120) -> None:
    """Connect to the Ray at RAY_ADDRESS. Raises Ray's error when it isn't up after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            ray.init(namespace="serve")
            return
        except Exception:  # Ray raises a plain one when its node is still starting.
            ray.shutdown()  # Else the next attempt counts as a second connection.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


if __name__ == "__main__":
    asked = json.loads(os.environ["BENCHMARK"])
    if sys.argv[1] == "settings":
        print(json.dumps([changed_settings(one["base"], one["llm_config"]) for one in asked], default=str))
    else:
        connect()  # First: the import of an app connects to Ray, too, where nothing has.
        app = build(changed_settings(asked["base"], asked["llm_config"]), asked["router_hop"])
        serve.start(proxy_location="EveryNode", http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
        serve.run(app)
