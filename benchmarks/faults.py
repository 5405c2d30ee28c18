"""Count the requests that fail while a server is updated, or loses a replica: `python -m benchmarks.faults loss NAME`.

The server is one that `python -m benchmarks.run start` has started. `update` deploys it anew with other settings and
surge, which takes a free GPU. `loss` kills the engine of one of its replicas. Clients send one request after another
meanwhile. The outcome is added to FILE, beside what was measured where.
"""

import argparse
import json
import os
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import requests

from benchmarks.servers import BUILD, family, load_state, ports, replicas

OUTPUT_TOKENS = 128


def send(url: str, model: str, stop: threading.Event, outcomes: list[dict]) -> None:
    """Send requests until told to stop. Notes each one's begin and end (s, monotonic) and its outcome."""
    number = 0
    while not stop.is_set():
        number += 1
        body = {"model": model, "prompt": f"{threading.get_ident()} {number} " + "word " * 100}
        body |= {"max_tokens": OUTPUT_TOKENS, "ignore_eos": True}
        began_s = time.monotonic()
        try:
            outcome = str(requests.post(url, json=body, timeout=120).status_code)
        except requests.RequestException as error:
            outcome = type(error).__name__
        outcomes.append({"began_s": began_s, "ended_s": time.monotonic(), "outcome": outcome})
        if outcome != "200":
            stop.wait(0.1)


def status(serve) -> dict[str, tuple[str, dict]]:
    """Of each deployment, its status and its replicas by state; nothing while the app isn't known."""
    app = serve.get_serve_details()["applications"].get("default", {"deployments": {}})
    states = {name: Counter(r["state"] for r in one["replicas"]) for name, one in app["deployments"].items()}
    return {name: (one["status"], dict(states[name])) for name, one in app["deployments"].items()}


def update(server: dict, serve) -> None:
    """Deploy the server's app with another stream_interval, as a Serve config file would, with surge."""
    ask = json.loads(json.dumps(server["asked"]))
    ask["llm_config"].setdefault("engine_kwargs", {})["stream_interval"] = 4
    app = {"name": "default", "route_prefix": "/", "import_path": "benchmarks.app:from_file", "args": ask}
    app["deployments"] = [{"name": name, "max_surge_percent": 100} for name in status(serve)]
    serve.deploy_applications({"http_options": {"host": "127.0.0.1"}, "applications": [app]})


def engines(server: dict) -> list[psutil.Process]:
    """The server's engines: children of its replicas. In a small environment they lack vLLM's name for them."""
    found = [p for p in family(server) if "LLMServer" in " ".join(p.cmdline())]
    children = [child for replica in found for child in replica.children()]
    return [p for p in children if "EngineCore" in " ".join(p.cmdline()) or "spawn_main" in " ".join(p.cmdline())]


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def is_whole(server: dict, serve) -> bool:
    """Whether all of it runs, in as many replicas as were asked for."""
    found = status(serve)
    counts = [states for name, (_, states) in found.items() if name.startswith("LLMServer")]
    return all(state == "HEALTHY" for state, _ in found.values()) and counts == [{"RUNNING": replicas(server)}]


def wait(condition, what: str, timeout_s: float) -> None:
    """Poll each second. Raises TimeoutError when `condition()` doesn't hold within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"After {timeout_s:.0f} s, not yet: {what}")
        time.sleep(1)


def measure(event: str, name: str, clients: int, timeout_s: float) -> dict:
    """Bring the event about under load. Returns how many requests were sent and failed, and when."""
    os.environ["RAY_AUTH_MODE"] = "token"  # Read by the next import
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient  # What the `serve` command uses

    servers = load_state()["servers"]
    [index] = [index for index, server in enumerate(servers) if server["name"] == name] or [None]
    if index is None:
        raise SystemExit(f"{name} isn't up. There are: {', '.join(server['name'] for server in servers)}")
    server, serve = servers[index], ServeSubmissionClient(f"http://127.0.0.1:{ports(index)[2]}")
    url, outcomes, stop = f"http://127.0.0.1:{server['port']}/v1/completions", [], threading.Event()
    old = engines(server)
    with ThreadPoolExecutor(clients) as pool:
        for _ in range(clients):
            pool.submit(send, url, server["model_id"], stop, outcomes)
        try:
            time.sleep(5)
            event_s = time.monotonic()
            if event == "update":
                update(server, serve)
                wait(lambda: not any(map(alive, old)), "the old engine's end", timeout_s)
            else:
                old[0].kill()
                wait(lambda: set(engines(server)) - set(old), "another engine's beginning", timeout_s)
            wait(lambda: is_whole(server, serve), "all replicas running", timeout_s)
            whole_s = time.monotonic() - event_s
            time.sleep(5)
        finally:
            stop.set()
    failed = [one for one in outcomes if one["outcome"] != "200"]
    answered = [one["ended_s"] - one["began_s"] for one in outcomes if one["outcome"] == "200"]
    return {
        "server": server["name"],
        "replicas": replicas(server),
        "clients": clients,
        "sent": len(outcomes),
        "failed": dict(Counter(one["outcome"] for one in failed)),
        "last_failure_ended_s": round(max([one["ended_s"] for one in failed], default=event_s) - event_s, 1),
        "longest_answer_s": round(max(answered), 1),
        "whole_again_s": round(whole_s, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("event", choices=["update", "loss"])
    parser.add_argument("server", help="name of one that is up")
    parser.add_argument("--file", type=Path, default=BUILD / "faults.json", help="where the outcome is added")
    parser.add_argument("--commit", required=True, help="that is measured")
    parser.add_argument("--clients", type=int, default=32, help="that send one request after another")
    parser.add_argument("--timeout-s", type=float, default=400, help="of each wait")
    args = parser.parse_args()
    found = measure(args.event, args.server, args.clients, args.timeout_s)
    kept = json.loads(args.file.read_text()) if args.file.exists() else {**load_state()["facts"], "events": {}}
    kept |= {"commit": args.commit, "events": {**kept["events"], args.event: found}}
    args.file.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"{args.event}: {found}")


if __name__ == "__main__":
    main()
