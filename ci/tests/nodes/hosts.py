"""Hosts of their own on this machine: each has a network address, its own processes, and its own files of Ray's."""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil

from ci.common import ROOT, run

BRIDGE, NETWORK = "llama-br", "10.208.47"
HERE = f"{NETWORK}.254"  # The address of this machine, where the clients are
TOOLS = ("ip", "unshare", "nsenter", "mount")
# What Ray and its HAProxy write to below /tmp, whose rest may hold this repository
OWN = ("ray", "haproxy-serve")


def why_not() -> str:
    """What keeps this machine from making hosts; empty where it can."""
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"{missing} aren't installed: apt-get install iproute2 util-linux mount"
    probe = run("unshare", "--net", "--mount", "--pid", "--fork", "ip", "link", "add", "probe", "type", "bridge")
    return "" if probe.returncode == 0 else f"only root may make network namespaces: {probe.stdout.strip()}"


def ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True, timeout=30)


def make_bridge() -> None:
    remove_bridge()
    ip("link", "add", BRIDGE, "type", "bridge")
    ip("address", "add", f"{HERE}/24", "dev", BRIDGE)
    ip("link", "set", BRIDGE, "up")


def remove_bridge() -> None:
    ip("link", "delete", BRIDGE, check=False)


class Host:
    """A network, mount and process namespace. What runs in it ends with it, as when a machine loses its power."""

    def __init__(self, number: int, folder: Path):
        self.name, self.address = f"llama-{number}", f"{NETWORK}.{number}"
        self.url, self.tmp, self.init = f"http://{self.address}:8000", folder / f"{number}", None
        self.tmp.mkdir()
        self.remove()
        ip("netns", "add", self.name)
        ip("link", "add", self.name, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        ip("link", "set", self.name, "master", BRIDGE, "up")
        for setting in (
            ("address", "add", f"{self.address}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("link", "set", "lo", "up"),
        ):
            ip("-n", self.name, *setting)

    def start(self, command: list[str], folders: dict[str, Path], **env: str) -> None:
        """Run `command` as the first process of the host, as in a container, with `folders` mounted below /mnt.

        What it says goes to the file `said` of its folder.
        """
        self.wait()
        steps = ["mount -t tmpfs none /mnt"]
        steps += [f"mkdir {path} && mount --bind {folder} {path}" for path, folder in folders.items()]
        for name in OWN:
            shutil.rmtree(self.tmp / name, ignore_errors=True)  # A new container begins without the old one's files.
            (self.tmp / name).mkdir()
            steps += [f"mkdir -p /tmp/{name} && mount --bind {self.tmp / name} /tmp/{name}"]
        boot = " && ".join([*steps, "cd /", f"exec {shlex.join(command)}"])
        own = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with open(self.tmp / "said", "w") as said:
            self.init = subprocess.Popen(
                # Not ends_with_this(): `unshare` ignores SIGTERM.
                ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", self.name, *own, "bash", "-c", boot],
                env={**os.environ, **env},
                stdout=said,
                stderr=said,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def run(self, *command: str, timeout_s: float = 120, **env: str) -> subprocess.CompletedProcess:
        """Run a command of the host, in the repository."""
        enter = ["nsenter", f"--target={self.first().pid}", "--net", "--mount", "--pid", f"--wd={ROOT}"]
        return run(*enter, *command, timeout_s=timeout_s, **env)

    def first(self) -> psutil.Process:
        deadline = time.monotonic() + 30
        while not (children := psutil.Process(self.init.pid).children()):
            assert self.init.poll() is None, (self.tmp / "said").read_text()
            assert time.monotonic() < deadline, f"{self.name} has no first process"
            time.sleep(0.1)  # `unshare` has yet to start it.
        return children[0]

    def runs(self) -> bool:
        return self.init is not None and self.init.poll() is None

    def processes(self, name: str) -> list[psutil.Process]:
        """The host's processes whose command line contains `name`."""
        found = []
        for process in psutil.Process(self.init.pid).children(recursive=True) if self.runs() else []:
            with contextlib.suppress(psutil.Error):  # It ended meanwhile.
                found += [process] if name in " ".join(process.cmdline()) else []
        return found

    def terminate(self) -> None:
        """Ask the first process to end, as Kubernetes does before it deletes a pod."""
        self.first().send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End every process at once, without a wait for it."""
        with contextlib.suppress(psutil.Error, AssertionError):  # It may end at the same time.
            if self.runs():
                self.first().kill()

    def wait(self) -> None:
        """Wait until nothing of the host runs any more, which takes a while on a busy machine."""
        if self.init:
            self.init.wait(timeout=120)

    def cut_off(self) -> None:
        """Nothing reaches the host any more, and nobody is told."""
        ip("link", "set", self.name, "down")

    def mend(self) -> None:
        ip("link", "set", self.name, "up")

    def remove(self) -> None:
        self.kill()
        self.wait()
        ip("link", "delete", self.name, check=False)
        ip("netns", "delete", self.name, check=False)
