"""What takes the engine's packages, but no server."""

import sys

import pytest

from ci.common import run


@pytest.mark.section("Configure Ray Serve LLM")
def test_token_appears_nowhere_when_the_app_is_imported():
    canary = "hf_" + 2 * "canary0123456789"  # In two parts, since no such string may be committed
    show = "import serve_llama_3_1_8b as s; print(repr(s.llm_config), s.llm_config.model_dump())"
    result = run("python", "-c", show, HF_TOKEN=canary, RAY_ADDRESS="local")  # Building the app needs some Ray.
    assert result.returncode == 0, result.stdout
    assert canary not in result.stdout, "serve_llama_3_1_8b.py puts HF_TOKEN into the configuration, which Ray prints."


@pytest.mark.section("Start the app with tools")
@pytest.mark.parametrize(
    "module, added",
    [
        ("serve_with_tools", ["'enable_auto_tool_choice': True", "'llama3_json'", "'disable_any_whitespace': True"]),
        (
            "serve_with_adapters",
            ["'enable_lora': True", "'max_loras': 4", "'max_cpu_loras': 16", "'max_lora_rank': 16"],
        ),
        ("serve_in_fp8", ["'quantization': 'fp8_per_channel'"]),
    ],
)
def test_engine_gets_what_a_file_adds_to_the_app(module, added):
    """Ray keeps the engine's settings of an LLMConfig that was built: what is added to that one is lost."""
    show = f"import {module} as m; e = m.llm_config.get_engine_config(); print(e.engine_kwargs, e.frontend_kwargs)"
    needs = {"ADAPTERS": "s3://bucket/adapters", "RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY": "1"}
    result = run("python", "-c", show, RAY_ADDRESS="local", **needs)
    assert result.returncode == 0, result.stdout
    missing = [one for one in [*added, "'stream_interval': 8", "'backend': 'xgrammar'"] if one not in result.stdout]
    assert not missing, f"{missing}: {result.stdout[-2000:]}"


@pytest.mark.section("Check your machine")
def test_checkpoint_that_was_cut_off_is_made_anew(tmp_path):
    """With a limit on the size of files, which stands for a full disk, nothing is left that looks finished."""
    program = (
        "import sys, pathlib, tiny_llama.make_model as m; m.fit = lambda *_: None; "
        "m.MODEL_DIR = pathlib.Path(sys.argv[1]); m.main()"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "tiny-llama")]
    result = run("prlimit", "--fsize=1000000", *command)
    assert result.returncode == 1 and "File too large" in result.stdout, result.stdout
    assert not (tmp_path / "tiny-llama").exists()
    result = run(*command)
    assert result.returncode == 0, result.stdout
    assert (tmp_path / "tiny-llama" / "model.safetensors").stat().st_size > 1_000_000
    assert [file.name for file in tmp_path.iterdir()] == ["tiny-llama"]


@pytest.mark.section("Improve concurrency")
def test_engine_takes_the_share_of_memory_that_the_arithmetic_takes(cell):
    from vllm.config import CacheConfig

    assert CacheConfig.gpu_memory_utilization == 0.92 and "0.92 by default" in cell("dashboard")
    assert "0.92 * memory_gib" in cell("kv-arithmetic")


@pytest.mark.section("Scale with the load")
def test_compiled_code_of_one_gpu_is_kept_for_all():
    """What TROUBLESHOOTING.md says of this vLLM. When this fails, vLLM tells its GPUs apart: take the advice back."""
    show = "import inspect, vllm.compilation.decorators as d, vllm.envs as e; "
    show += "print(e.VLLM_USE_AOT_COMPILE, 'cache_dir, f\"rank_{rank}_{dp_rank}\")' in inspect.getsource(d))"
    for off in "0", "1":
        said = run(sys.executable, "-c", show, VLLM_DISABLE_COMPILE_CACHE=off).stdout.splitlines()[-1]
        assert said == f"{off == '0'} True"
