# serve_with_tools.py
from ray.serve.llm import LLMConfig, build_openai_app

from serve_llama_3_1_8b import llm_config

settings = llm_config.model_dump(exclude_unset=True)
settings["engine_kwargs"] |= dict(enable_auto_tool_choice=True, tool_call_parser="llama3_json")
settings["engine_kwargs"]["structured_outputs_config"]["disable_any_whitespace"] = True
llm_config = LLMConfig(**settings)  # A new one: Ray ignores changes to one that was built into an app.
app = build_openai_app({"llm_configs": [llm_config]})
