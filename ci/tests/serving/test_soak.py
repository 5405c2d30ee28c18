"""Ten minutes of mixed load: `make soak`."""

import random
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import requests

from ci.tests.serving.app import COMPLETION, URL, complete, metric, stream_is_whole, wait_for


@pytest.mark.section("Harden the app")
@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_ten_minutes_of_mixed_load_fail_nothing_and_leak_nothing(served):
    """`make soak`. The first two minutes fill caches and pools; the rest is compared with what they left."""
    chance, sent, memory_mib = random.Random(0), [], []
    stream = {**COMPLETION, "max_tokens": 300, "ignore_eos": True, "stream": True}
    named = re.compile(r"ray::Serve(Replica|Controller)|ray::HAProxy|VLLM::|bin/haproxy|raylet/raylet|gcs_server")

    def send(kind: str) -> str:
        if kind == "malformed":
            return f"refused with {complete(max_tokens=-1).status_code}"
        if kind in ("short", "long"):
            return str(complete(max_tokens=8 if kind == "short" else 1000, ignore_eos=True).status_code)
        with requests.post(f"{URL}/v1/completions", json=stream, stream=True, timeout=60) as answer:
            lines = answer.iter_lines()
            if kind == "cancelled":
                return "left" if next(lines).startswith(b"data: ") else "no stream"
            return "whole" if stream_is_whole(lines) else "broken"

    def client():
        while time.monotonic() < end_s:
            kind = chance.choice(["short", "long", "streamed", "cancelled", "malformed"])
            try:
                sent.append((kind, send(kind)))
            except requests.RequestException as error:
                sent.append((kind, type(error).__name__))

    end_s = time.monotonic() + 600
    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(client) for _ in range(8)]
        while time.monotonic() < end_s:
            time.sleep(15)
            processes = psutil.process_iter(["cmdline", "memory_info"])
            found = [(named.search(" ".join(p.info["cmdline"] or [])), p) for p in processes]
            memory_mib.append({f"{name[0]} {p.pid}": p.info["memory_info"].rss / 2**20 for name, p in found if name})
    assert all(one.result() is None for one in clients)
    outcomes = Counter(sent)
    print(dict(outcomes))
    good = {
        ("short", "200"),
        ("long", "200"),
        ("streamed", "whole"),
        ("cancelled", "left"),
        ("malformed", "refused with 400"),
    }
    assert set(outcomes) == good and min(outcomes.values()) > 50
    wait_for(lambda: metric("ray_vllm_num_requests_running") == 0, "end of the last requests", 60)
    before, after = memory_mib[8], memory_mib[-1]
    assert before.keys() == after.keys()
    for name, mib in before.items():
        print(f"{name}: {mib:.0f} MiB after two minutes, {after[name]:.0f} at the end")
    # 5 %, or 5 MiB where that is more: small processes, such as the raylet, grow by some 3 MiB at first.
    assert all(after[name] - mib < max(0.05 * mib, 5) for name, mib in before.items())
