"""The tutorial's app with random weights, to record a run on a machine that lacks the real ones: APP=records.app:app.

Speed and memory are those of the real model. Its answers are noise, so they end after MOST_TOKENS (384): as long as
the longest that the notebook asks for. A replica that has nothing to do ends after half a minute, as the stand-in's.
"""

import os

from ray.serve.llm import LLMConfig, build_openai_app

from serve_llama_3_1_8b import llm_config

settings = llm_config.model_dump(exclude_unset=True)
most = int(os.environ.get("MOST_TOKENS", "384"))
settings["engine_kwargs"] |= {"load_format": "dummy", "override_generation_config": {"max_new_tokens": most}}
settings["deployment_config"]["autoscaling_config"]["downscale_delay_s"] = 30
app = build_openai_app({"llm_configs": [LLMConfig(**settings)]})
