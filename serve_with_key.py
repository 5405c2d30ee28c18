# serve_with_key.py
from ray.serve.llm import build_openai_app

from api_key import require_key
from serve_llama_3_1_8b import llm_config

llm_config.engine_kwargs.update(middleware=require_key())
app = build_openai_app({"llm_configs": [llm_config]})
