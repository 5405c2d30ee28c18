# serve_with_key.py
from ray.serve.llm import LLMConfig, build_openai_app

from api_key import require_key
from serve_llama_3_1_8b import llm_config

settings = llm_config.model_dump(exclude_unset=True)
settings["engine_kwargs"]["middleware"] = require_key()
app = build_openai_app({"llm_configs": [LLMConfig(**settings)]})
