"""The app with tools, shrunk."""

from ray.serve.llm import build_openai_app

from serve_with_tools import llm_config
from tiny_llama.app import shrunk

app = build_openai_app({"llm_configs": [shrunk(llm_config)]})
