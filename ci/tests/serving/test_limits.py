"""What a replica admits, and what becomes of requests whose client leaves."""

import asyncio
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import aiohttp
import pytest
import requests
from openai import OpenAI

from ci.tests.serving.app import API_KEY, CHAT, COMPLETION, URL, complete, metric, wait_for


async def burst(path: str, body: dict, size: int) -> Counter:
    """Send `size` requests at once, and count their statuses."""
    gate = asyncio.Event()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=300)) as session:

        async def send():
            await gate.wait()
            async with session.post(f"{URL}{path}", json=body) as answer:
                await answer.read()
                return answer.status

        sent = [asyncio.create_task(send()) for _ in range(size)]
        await asyncio.sleep(0)
        gate.set()
        return Counter(await asyncio.gather(*sent))


@pytest.mark.section("Harden the app")
@pytest.mark.parametrize("size", [64, 128, 200, 256])
@pytest.mark.parametrize("path, body", [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)])
def test_no_burst_is_refused_while_there_is_room(served, path, body, size):
    """The first of these bursts meets a replica that has just started."""
    for _ in range(10):
        assert asyncio.run(burst(path, body, size)) == {200: size}


@pytest.mark.section("Harden the app")
@pytest.mark.parametrize("headers", [{}, {"x-request-disconnect-disabled": "?1"}], ids=["plain", "header game"])
def test_requests_of_a_client_that_leaves_end(served, headers):
    def tokens() -> float:
        return metric("ray_vllm_generation_tokens_total")

    before = tokens()
    long = {**COMPLETION, "max_tokens": 8000, "n": 4, "ignore_eos": True, "stream": True}
    with requests.post(f"{URL}/v1/completions", json=long, headers=headers, stream=True, timeout=60) as response:
        assert next(response.iter_lines()).startswith(b"data: ")
    time.sleep(5)  # Ray reports the metrics every two seconds, later when the machine is busy.
    wait_for(lambda: metric("ray_vllm_num_requests_running") == 0, "end of the abandoned requests")
    assert 0 < tokens() - before < 16_000, "They ran to their end, which is after 32,000 tokens"


@pytest.mark.section("Harden the app")
def test_more_than_a_replica_admits_is_told_to_come_back(served, cell, quoted):
    limits = re.findall(r"max_(?:ongoing|queued)_requests=(\d+)", cell("serve-app"))
    accepted = sum(map(int, limits))
    assert len(limits) == 2
    client = OpenAI(base_url=f"{URL}/v1", api_key=API_KEY, max_retries=20)
    with ThreadPoolExecutor(accepted + 80) as pool:
        sent = [pool.submit(complete, max_tokens=256, ignore_eos=True) for _ in range(accepted + 80)]
        wait_for(lambda: any(one.done() and one.result().status_code == 429 for one in sent), "refusal")
        patient = client.completions.with_raw_response.create(**COMPLETION)
    answers = [one.result() for one in sent]
    counts = Counter(answer.status_code for answer in answers)
    print(f"Overload: {dict(counts)}, a client that came back {patient.retries_taken} times has its answer")
    assert set(counts) == {200, 429} and counts[200] >= accepted
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.headers["Retry-After"] for answer in refused} == {"5"} and patient.retries_taken >= 1
    quoted("Request dropped due to backpressure", refused[0].text)
    assert complete().status_code == 200
