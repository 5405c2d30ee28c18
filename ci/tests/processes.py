"""What of the tutorial runs on the machine."""

import contextlib
import re
import time

import psutil

OURS = re.compile(
    r"bin/(ray|serve|vllm) |-m (benchmarks\.app|vllm\.entrypoints|ray\.scripts)"
    r"|/ray/(core|dashboard|autoscaler|_private)/|ray::|VLLM::|bin/haproxy|ipykernel"
)


def what_the_tutorial_runs() -> set[str]:
    """Each process of the kinds that the tutorial starts, with the TCP ports that it listens on, as readable text."""
    found = set()
    for process in psutil.process_iter(["pid", "cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if OURS.search(command):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                listening = [c for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
                ports = sorted(c.laddr.port for c in listening)
                found.add(f"{process.info['pid']} {command[:200]}, ports {ports}")
    return found


def ends_with_this(*command: str) -> list[str]:
    """The command, for a process that is asked to end when this one dies, even if it is killed."""
    return ["setpriv", "--pdeathsig", "TERM", *command]


def assert_nothing_left(before: set[str]) -> None:
    """Fail when a process that wasn't there `before` is still there after a minute."""
    deadline = time.monotonic() + 60
    while (left := what_the_tutorial_runs() - before) and time.monotonic() < deadline:
        time.sleep(1)
    assert not left, "\n".join(sorted(left))
