"""Where the app and its cluster listen, and who may talk to them."""

import os
import re
import stat
from pathlib import Path

import pytest
import requests

from ci.common import ROOT, run
from ci.tests.serving.app import CHAT, URL, listening, processes

# Ray's own processes take these from the range for ephemeral ports.
EPHEMERAL = range(10002, 65536)
REPLICAS = range(30000, 31001)
OF_SERVE = {8000, 8500}  # HAProxy, and the proxy that serves where no replica runs
LOOPBACK = {"127.0.0.1", "[::1]", "[::ffff:127.0.0.1]"}


@pytest.mark.section("Where it listens")
def test_app_of_the_config_file_listens_on_loopback_only(served, quoted):
    quoted("... replicas that have taken more than ... to initialize.", served)
    ports = listening()
    of_the_app = [port for port in ports if port in OF_SERVE or port in REPLICAS]
    assert OF_SERVE < set(of_the_app) and all(ports[port] == {"127.0.0.1"} for port in of_the_app), ports


@pytest.mark.section("Where it listens")
def test_text_names_each_port_that_listens_on_all_networks(cluster, served):
    others = cluster
    text = (ROOT / "SECURITY.md").read_text().partition("## Know what listens")[2].partition("\n## ")[0]
    named = {int(port) for row in re.findall(r"^\| ([\d, ]+)", text, flags=re.M) for port in re.findall(r"\d+", row)}
    assert named == {6379, 10001, 8080, 44217, 44227, 8404, 9101, 8265, 52365}
    ports = listening()
    assert not named - set(ports), f"The text names these, and nothing listens there: {named - set(ports)}"
    beyond = {port for port, addresses in ports.items() if not addresses <= LOOPBACK}
    print("Listening beyond loopback:", sorted(beyond))
    assert {8404, 9101} <= beyond and 8265 not in beyond
    unnamed = {port for port in beyond - named - others if port not in EPHEMERAL}
    assert not unnamed, f"These listen beyond loopback, and the text doesn't say so: {unnamed}"


@pytest.mark.section("Where it listens")
def test_admin_socket_is_closed_to_other_users(served):
    # A Ray that was killed leaves its folder behind, so ask the HAProxy of the app for its own.
    ours = [p for p in processes("haproxy.cfg") if any(c.laddr.port == 8000 for c in p.net_connections("tcp"))]
    [config] = {arg for p in ours for arg in p.cmdline() if arg.endswith("haproxy.cfg")}
    socket = Path(config).with_name("admin.sock")
    folders = [folder for folder in socket.parents if folder.is_relative_to("/tmp/haproxy-serve")]
    assert socket.is_socket()
    assert any(stat.S_IMODE(folder.stat().st_mode) & 0o077 == 0 for folder in folders), "umask 077 is missing"
    if os.getuid() == 0:
        ask = f"import socket; socket.socket(socket.AF_UNIX).connect('{socket}')"
        result = run("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "python3", "-c", ask)
        assert "PermissionError" in result.stdout, result.stdout


@pytest.mark.section("Harden the app")
def test_pages_of_other_origins_may_not_use_the_endpoint(served):
    foreign = {"Origin": "https://foreign.example"}
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    preflight = requests.options(f"{URL}/v1/chat/completions", headers=foreign | asked, timeout=30)
    assert preflight.status_code == 400 and "Access-Control-Allow-Origin" not in preflight.headers
    # A form or plain text needs no preflight, so the server itself has to refuse it.
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        headers = foreign | {"Content-Type": content_type}
        answer = requests.post(f"{URL}/v1/chat/completions", json=None, data=str(CHAT), headers=headers, timeout=30)
        assert answer.status_code == 400, f"{content_type}: {answer.status_code}"
    answer = requests.post(f"{URL}/v1/chat/completions", json=CHAT, headers=foreign, timeout=60)
    assert answer.status_code == 200 and "Access-Control-Allow-Origin" not in answer.headers
