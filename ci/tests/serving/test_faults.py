"""The engine, the only replica or the router fails."""

import importlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ci.tests.serving.app import (
    ROUTER,
    URL,
    complete,
    engines,
    load,
    processes,
    replicas,
    report,
    running_replicas,
    wait_for,
)


def replaced(what: str, victims) -> list:
    """Kill the only process of `victims` under load, and wait for its replacement. Returns what the load saw."""
    [process] = victims()
    with load() as outcomes:
        time.sleep(3)
        process.kill()
        killed_s = time.monotonic()
        wait_for(lambda: running_replicas() == 1 and complete().status_code == 200, "replacement", 400)
        back_s = time.monotonic()
        time.sleep(3)
    failed = report(what, outcomes, killed_s)
    # Who is under way at the death fails, which may be nobody. Who comes later fails, or waits for the new replica.
    felt = [end_s for start_s, end_s, outcome, _ in outcomes if outcome != 200 or end_s - start_s > 5]
    assert felt and min(felt) > killed_s - 2, "The load didn't see the death, or was ill before it"
    assert max(one[0] for one in outcomes) > back_s, "The load didn't see the end of the outage"
    assert not [one for one in failed if not killed_s - 2 < one[0] < back_s], failed
    assert len(engines()) == 1 and process.pid not in {p.pid for p in victims()}
    return outcomes


@pytest.mark.section("Troubleshooting")
def test_only_engine_is_replaced(served, quoted):
    outcomes = replaced("The only engine dies", engines)
    quoted("EngineCore encountered an issue.", next(one[3] for one in outcomes if one[2] == 500))


@pytest.mark.section("Write a client that copes")
def test_only_replica_is_replaced_and_a_patient_client_has_its_answer(served, monkeypatch):
    """The client's stream breaks, and so may some more requests until there is another replica."""
    monkeypatch.setenv("BASE_URL", URL)
    client = importlib.reload(importlib.import_module("patient_client"))
    create, asked, begun = client.client.chat.completions.create, [], threading.Event()

    def create_long(**request):
        asked.append(request)
        long = {"max_tokens": 8000, "extra_body": {"ignore_eos": True}} if len(asked) == 1 else {}
        stream = create(**request | long)
        begun.set()
        return stream

    monkeypatch.setattr(client.client.chat.completions, "create", create_long)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.ask, "Tell me a story")
        assert begun.wait(60), "No stream has begun"
        replaced("The only replica dies", replicas)
        text = answer.result(timeout=400)
    print(f"The client asked {len(asked)} times until it had its answer")
    assert text.startswith("Once upon a time") and len(asked) > 1


@pytest.mark.section("Troubleshooting")
def test_silent_router_means_503(served, quoted):
    [router] = processes(ROUTER)
    router.suspend()
    try:
        answer = complete()
    finally:
        router.resume()
    assert answer.status_code == 503
    quoted("Ingress request router failed", answer.text)
    wait_for(lambda: complete().status_code == 200, "completion")
