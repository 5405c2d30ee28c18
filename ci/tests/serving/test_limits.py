"""What a replica admits, and what becomes of requests whose client leaves."""

import asyncio
import contextlib
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import aiohttp
import pytest
import requests
from openai import AsyncOpenAI

from ci.tests.serving.app import API_KEY, CHAT, COMPLETION, URL, complete, metric, wait_for


async def burst(path: str, body: dict, size: int, refused: asyncio.Event | None = None) -> list[tuple]:
    """Send `size` requests at once; returns each one's status, Retry-After header and text.

    Sets `refused` at the first 429."""
    gate = asyncio.Event()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600)) as session:

        async def send():
            await gate.wait()
            async with session.post(f"{URL}{path}", json=body) as answer:
                if refused and answer.status == 429:
                    refused.set()
                return answer.status, answer.headers.get("Retry-After"), await answer.text()

        sent = [asyncio.create_task(send()) for _ in range(size)]
        await asyncio.sleep(0)
        gate.set()
        return await asyncio.gather(*sent)


@pytest.mark.section("Harden the app")
@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("path, body", [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)])
def test_no_burst_is_refused_while_there_is_room(served, path, body, size):
    """The first of these bursts meets a replica that has just started."""
    for _ in range(5):
        answers = asyncio.run(burst(path, body, size))
        assert Counter(status for status, _, _ in answers) == {200: size}


@pytest.mark.section("Harden the app")
@pytest.mark.parametrize("headers", [{}, {"x-request-disconnect-disabled": "?1"}], ids=["plain", "header game"])
def test_requests_of_a_client_that_leaves_end(served, headers):
    def tokens() -> float | bool:
        """How many the engine has generated, once two readings agree: they are reported late. Else False."""
        first = metric("ray_vllm_generation_tokens_total")
        time.sleep(5)
        return first == metric("ray_vllm_generation_tokens_total") and first

    before = wait_for(tokens, "end of the requests before")
    long = {**COMPLETION, "max_tokens": 8000, "n": 4, "ignore_eos": True, "stream": True}
    with requests.post(f"{URL}/v1/completions", json=long, headers=headers, stream=True, timeout=60) as response:
        assert next(response.iter_lines()).startswith(b"data: ")
    wait_for(lambda: metric("ray_vllm_generation_tokens_total") > before, "report of the tokens")
    wait_for(lambda: not metric("ray_vllm_num_requests_running"), "report that none runs")
    after = wait_for(tokens, "end of the abandoned requests")
    assert 0 < after - before < 16_000, "They ran to their end, which is after 32,000 tokens"


@pytest.mark.section("Troubleshooting")
def test_request_without_a_stream_runs_to_its_end_when_its_client_leaves(served):
    """Of Ray Serve LLM 2.60.0. Where one ends, TROUBLESHOOTING.md may stop saying so."""
    wait_for(lambda: not metric("ray_vllm_num_requests_running"), "end of the requests before")
    time.sleep(5)  # Until the last of them is reported
    ended = metric("ray_vllm_request_success_total")
    long = {**COMPLETION, "max_tokens": 2000, "ignore_eos": True}

    def give_up(_: int) -> None:
        with pytest.raises(requests.ReadTimeout):
            requests.post(f"{URL}/v1/completions", json=long, timeout=3)  # Time to reach the engine

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(give_up, range(4)))
    wait_for(lambda: metric("ray_vllm_request_success_total") == ended + 4, "end of each request, as if awaited")


@pytest.mark.section("Harden the app")
def test_more_than_a_replica_admits_is_told_to_come_back(served, cell, quoted):
    limits = re.findall(r"max_(?:ongoing|queued)_requests=(\d+)", cell("serve-app"))
    accepted = sum(map(int, limits))
    assert len(limits) == 2
    counted = []

    async def watch_autoscaler(load: asyncio.Task):
        while not load.done():
            with contextlib.suppress(requests.RequestException):  # It may be late on a busy machine.
                counted.append(await asyncio.to_thread(metric, "ray_serve_autoscaling_total_requests"))
            await asyncio.sleep(1)

    async def overload():
        long = COMPLETION | {"max_tokens": 128, "ignore_eos": True}
        refused = asyncio.Event()
        at_once = asyncio.create_task(burst("/v1/completions", long, accepted + 80, refused))
        watch = asyncio.create_task(watch_autoscaler(at_once))
        await asyncio.wait_for(refused.wait(), timeout=60)
        async with AsyncOpenAI(base_url=f"{URL}/v1", api_key=API_KEY, max_retries=100) as client:
            patient = await client.completions.with_raw_response.create(**COMPLETION)
        await watch
        return await at_once, patient.retries_taken

    start_s = time.monotonic()
    answers, retries = asyncio.run(overload())
    counts = Counter(status for status, _, _ in answers)
    print(f"Overload: {dict(counts)} in {time.monotonic() - start_s:.0f} s; one that came back {retries} times got in")
    most = max(counted, default=0)
    print(f"The autoscaler counted at most {most:.0f} requests")
    assert 0 < most <= int(limits[0]), "It counts requests that wait for a place, too: say so in the text"
    assert set(counts) == {200, 429} and counts[200] >= accepted and retries >= 1
    refused = [(retry_after, text) for status, retry_after, text in answers if status == 429]
    assert {retry_after for retry_after, _ in refused} == {"5"}
    quoted("Request dropped due to backpressure", refused[0][1])
    assert complete().status_code == 200
