"""What happens on several nodes: who reaches whom, and what the loss of a node or of the head costs."""

import contextlib
import itertools
import time

import psutil
import pytest
import requests

from ci.tests.nodes.conftest import ask
from ci.tests.serving.app import COMPLETION, KEY, load, report, stream_is_whole, wait_for

pytestmark = [pytest.mark.nodes, pytest.mark.section("More than one node")]
REPLICA = "ray::ServeReplica:default:LLMServer"


def ports_of_replica(host) -> dict[int, str]:
    """The ports on which the host's replica waits for HAProxy, each with its address."""
    [replica] = host.processes(REPLICA)
    listening = [one.laddr for one in replica.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    return {address.port: address.ip for address in listening if 30000 <= address.port <= 31000}


def reaches(host, other, port: int) -> bool:
    return host.run("timeout", "5", "bash", "-c", f"exec 3<> /dev/tcp/{other.address}/{port}").returncode == 0


def test_loopback_address_keeps_replicas_from_other_nodes(cluster, request):
    """With serve_config.yaml's host, no other machine reaches a node, and no other node the replica."""
    cluster.deploy(host="127.0.0.1")
    request.addfinalizer(lambda: cluster.api("DELETE", "serve/applications/"))
    wait_for(lambda: cluster.running() == 1, "replica", 300)
    [own] = [host for host in cluster.workers if host.processes(REPLICA)]
    ports = ports_of_replica(own)
    print(f"host 127.0.0.1: the replica listens on {ports}")
    assert set(ports.values()) == {"127.0.0.1"}
    assert not any(reaches(cluster.head, own, port) for port in ports)
    assert [cluster.health(host) for host in cluster.hosts] == [None, None, None]
    [log] = cluster.head.tmp.glob("ray/session_2*/logs/serve/controller_[0-9]*.log")
    assert "won't accept connections from HAProxy on other nodes" in log.read_text()


def test_each_node_has_a_replica_and_answers(served):
    cluster = served.cluster
    assert [len(host.processes(REPLICA)) for host in cluster.hosts] == [0, 1, 1]
    for host, other in itertools.product(cluster.hosts, cluster.workers):
        assert all(reaches(host, other, port) for port in ports_of_replica(other))
    for host in cluster.hosts:
        assert {ask(host.url).status_code for _ in range(10)} == {200}
        assert requests.post(f"{host.url}/v1/completions", json=COMPLETION, timeout=30).status_code == 401


@contextlib.contextmanager
def streams(url: str):
    """Four long streams through `url`, begun one after the other, so that the router deals them out in turn."""
    long = {**COMPLETION, "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with contextlib.ExitStack() as stack:
        lines = []
        for _ in range(4):
            answer = requests.post(f"{url}/v1/completions", json=long, headers=KEY, stream=True, timeout=120)
            lines.append(stack.enter_context(answer).iter_lines())
            assert next(lines[-1]).startswith(b"data: ")
        yield lines


def come_back(cluster, host) -> None:
    """Start the host again, and wait for its replica."""
    began_s = time.monotonic()
    cluster.start(host)
    wait_for(lambda: cluster.running() == 2 and cluster.health(host) == 200, "replica on the node that came back", 300)
    print(f"  {time.monotonic() - began_s:.0f} s after the node came back, two replicas serve")


def test_killed_node_takes_its_own_streams_only(served):
    cluster, (stays, goes) = served.cluster, served.cluster.workers
    with streams(stays.url) as lines, load(lambda: ask(served.url)) as outcomes:
        time.sleep(2)
        goes.kill()
        killed_s = time.monotonic()
        whole = [stream_is_whole(one) for one in lines]
        time.sleep(20)
    failed = report("A worker is killed", outcomes, killed_s)
    print(f"  {whole.count(False)} of {len(whole)} streams through the other node broke")
    assert set(whole) == {True, False}, "Some of the streams were on the replica that died, some on the other"
    assert not [one for one in failed if one[0] > killed_s + 15], failed
    come_back(cluster, goes)


def test_node_that_is_asked_to_leave_fails_no_request(served):
    """SIGTERM, as when Kubernetes deletes a pod: answers under way finish, and the probe tells the balancer."""
    cluster, (_, goes) = served.cluster, served.cluster.workers
    with streams(goes.url) as lines, load(lambda: ask(served.url)) as outcomes:
        time.sleep(2)
        goes.terminate()
        asked_s, said = time.monotonic(), set()
        while goes.init.poll() is None and time.monotonic() < asked_s + 240:
            said.add(cluster.health(goes))
            time.sleep(0.5)
        assert goes.init.poll() is not None, "It didn't leave"
        print(f"The node left {time.monotonic() - asked_s:.0f} s after it was asked to; its probe said {said}")
        whole = [stream_is_whole(one) for one in lines]
        time.sleep(3)
    assert not report("A worker is asked to leave", outcomes, asked_s)
    assert all(whole), whole
    assert 503 in said
    come_back(cluster, goes)


def test_node_that_is_cut_off_delays_others_for_a_while(served):
    """Nobody is told, so connections to it hang until somebody gives up."""
    cluster, (_, goes) = served.cluster, served.cluster.workers
    with load(lambda: ask(served.url)) as outcomes:
        time.sleep(2)
        goes.cut_off()
        cut_s = time.monotonic()
        wait_for(lambda: cluster.nodes() == 2, "cluster that noticed", 120)
        print(f"The cluster noticed {time.monotonic() - cut_s:.0f} s after the cut")
        time.sleep(10)
    failed = report("A worker is cut off", outcomes, cut_s)
    assert not [one for one in failed if one[0] > cut_s + 60], failed
    goes.kill()
    goes.mend()


def test_head_that_dies_takes_the_cluster_with_it(served):
    """Without fault tolerance of its control store: replicas go on until their raylets give up on the head."""
    [stays, _] = served.cluster.workers
    with load(lambda: ask(stays.url)) as outcomes:
        time.sleep(2)
        served.cluster.head.kill()
        killed_s = time.monotonic()
        wait_for(lambda: not stays.processes(REPLICA), "end of the replica", 180)
        ended_s = time.monotonic()
        print(f"The replica ended {ended_s - killed_s:.0f} s after the head")
        time.sleep(2)
    before = [one for one in outcomes if one[1] < ended_s - 5]
    assert not report("The head is killed", before, killed_s), "Until then, replicas answer"
    assert outcomes[-1][2] != 200
