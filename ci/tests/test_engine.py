"""What takes the engine's packages, but no server."""

import json
import sys

import pytest

from ci.common import ROOT, run

LLAMA_8B = dict(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336,
    num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
)  # fmt: skip


@pytest.mark.section("Configure Ray Serve LLM")
def test_token_appears_nowhere_when_the_app_is_imported():
    canary = "hf_" + 2 * "canary0123456789"  # In two parts, since no such string may be committed
    show = "import serve_llama_3_1_8b as s; print(repr(s.llm_config), s.llm_config.model_dump())"
    result = run("python", "-c", show, HF_TOKEN=canary, RAY_ADDRESS="local")  # Building the app needs some Ray.
    assert result.returncode == 0, result.stdout
    assert canary not in result.stdout, "serve_llama_3_1_8b.py puts HF_TOKEN into the configuration, which Ray prints."


@pytest.mark.section("Check your machine")
def test_checkpoint_that_was_cut_off_is_made_anew(tmp_path):
    """With a limit on the size of files, which stands for a full disk, nothing is left that looks finished."""
    program = (
        "import sys, pathlib, tiny_llama.make_model as m; m.train = lambda *_: None; "
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


@pytest.mark.section("Scale with the load")
def test_room_of_the_smallest_gpu_for_the_autoscaling_target(cell):
    names = {}
    exec(cell("kv-arithmetic"), names)
    llama_8b = names["LlamaConfig"](**LLAMA_8B)
    tokens = names["kv_cache_gib"](22.5, llama_8b) * 2**30 / names["kv_bytes_per_token"](llama_8b)
    assert round(tokens / 700) == pytest.approx(50, abs=2)
    assert "some 50 requests of 700 tokens" in cell("about-autoscaling")


@pytest.mark.section("Improve concurrency")
@pytest.mark.parametrize("fp8", [False, True])
def test_kv_arithmetic_against_the_engines_log(cell, fp8):
    """The notebook's formula is within 3 % of what the engine logged on an H200, whose mark is in the figure."""
    names = {}
    exec(cell("kv-arithmetic"), names)
    kv_cache = json.loads((ROOT / "benchmarks" / "results" / "h200-kv-cache.json").read_text())
    measured = kv_cache["runs"][fp8]["kv_cache_tokens"]
    llama_8b = names["LlamaConfig"](**LLAMA_8B)
    cache_gib = names["kv_cache_gib"](kv_cache["memory_mib"] / 1024, llama_8b, fp8)
    assert cache_gib * 2**30 / names["kv_bytes_per_token"](llama_8b) == pytest.approx(measured, rel=0.03)
    assert f"plot(8192, {measured / 8192:.2f}, " in cell("draw-capacity")
