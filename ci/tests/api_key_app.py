"""The tiny app, asking for the key in API_KEY."""

from ray.serve.llm import build_openai_app

from api_key import require_key
from tiny_llama.app import llm_config

llm_config.engine_kwargs.update(middleware=require_key(), allowed_origins=["https://chat.example.com"])
app = build_openai_app({"llm_configs": [llm_config]})
