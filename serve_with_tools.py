# serve_with_tools.py
from ray.serve.llm import build_openai_app

from serve_llama_3_1_8b import llm_config

llm_config.engine_kwargs.update(enable_auto_tool_choice=True, tool_call_parser="llama3_json")
app = build_openai_app({"llm_configs": [llm_config]})
