"""The app with adapters, shrunk."""

from ray.serve.llm import build_openai_app

from serve_with_adapters import llm_config
from tiny_llama.app import shrunk

app = build_openai_app({"llm_configs": [shrunk(llm_config)]})
