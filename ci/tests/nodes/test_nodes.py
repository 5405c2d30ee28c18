"""What happens on several nodes: who reaches whom, and what the loss of a node or of the head costs."""

import contextlib
import itertools
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from ci.common import read_notebook, run
from ci.tests.nodes.conftest import ask, calm_load
from ci.tests.serving.app import COMPLETION, KEY, report, stream_is_whole, wait_for

pytestmark = [pytest.mark.nodes, pytest.mark.section("More than one node")]
REPLICA = "ray::ServeReplica:default:LLMServer"


def ports_of_replica(host) -> dict[int, str]:
    """The ports on which the host's replica waits for HAProxy, each with its address."""
    [replica] = host.processes(REPLICA)
    # psutil would list this machine's connections, whatever the process.
    listening = run("ip", "netns", "exec", host.name, "ss", "-Hltnp").stdout.splitlines()
    addresses = [line.split()[3].rpartition(":") for line in listening if f"pid={replica.pid}," in line]
    ports = {int(port): address for address, _, port in addresses if 30000 <= int(port) <= 31000}
    assert ports, listening
    return ports


def reaches(host, other, port: int) -> bool:
    return host.run("timeout", "5", "bash", "-c", f"exec 3<> /dev/tcp/{other.address}/{port}").returncode == 0


def test_loopback_address_keeps_replicas_from_other_nodes(cluster, request):
    """With serve_config.yaml's host, no other machine reaches a node, and no other node the replica."""
    cluster.deploy(1, host="127.0.0.1")
    request.addfinalizer(cluster.shut_down)
    wait_for(lambda: cluster.replicas() == ["RUNNING"], "replica", 300)
    [own] = [host for host in cluster.workers if host.processes(REPLICA)]
    ports = ports_of_replica(own)
    print(f"host 127.0.0.1: the replica listens on {ports}")
    assert set(ports.values()) == {"127.0.0.1"}
    assert not any(reaches(cluster.head, own, port) for port in ports)
    assert [cluster.health(host) for host in cluster.hosts] == [None, None, None]
    [log] = cluster.head.tmp.glob("ray/session_2*/logs/serve/controller_[0-9]*.log")
    assert "won't accept connections from HAProxy on other nodes" in log.read_text()


def test_each_node_has_a_replica_and_answers(served):
    assert [len(host.processes(REPLICA)) for host in served.hosts] == [0, 1, 1]
    for host, other in itertools.product(served.hosts, served.workers):
        assert all(reaches(host, other, port) for port in ports_of_replica(other))
    for host in served.hosts:
        assert {ask(host.url).status_code for _ in range(10)} == {200}
        assert requests.post(f"{host.url}/v1/completions", json=COMPLETION, timeout=30).status_code == 401


def begin_stream(url: str, tokens: int):
    """A stream of so many tokens, whose first part has come."""
    long = {**COMPLETION, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    answer = requests.post(f"{url}/v1/completions", json=long, headers=KEY, stream=True, timeout=60)
    lines = answer.iter_lines()
    assert next(lines).startswith(b"data: "), answer.text
    return lines


@contextlib.contextmanager
def under_way(streamed: str, asked: str, timeout_s: float = 30):
    """Eight clients of the URL `streamed` with stream after stream, and a calm load on `asked`.

    Yields a future of each client, whether its last stream came to its end, the load's outcomes, and what the test has
    to call at the event: no client begins another stream then.
    """
    happened = threading.Event()

    def stream_on(lines, tokens: int) -> bool:
        while stream_is_whole(lines):
            if happened.is_set():
                return True
            try:
                lines = begin_stream(streamed, tokens)
            except (requests.RequestException, StopIteration, AssertionError):
                if not happened.is_set():
                    raise
                return False  # It was about to begin when it happened.
        return False

    with calm_load(asked, timeout_s) as outcomes, ThreadPoolExecutor(8) as pool:
        try:
            # Eight, dealt out in turn with the load's requests: that one replica gets all of them is rare. Of eight
            # lengths: streams in step might all end just before it happens.
            begun = [(begin_stream(streamed, tokens), tokens) for tokens in range(1300, 2701, 200)]
            whole = [pool.submit(stream_on, *one) for one in begun]
            time.sleep(2)
            broken = [one.exception() or one.result() for one in whole if one.done()]
            assert not broken, f"Streams broke before anything happened: {broken}"
            yield whole, outcomes, happened.set
        finally:
            happened.set()


def settled(whole: list) -> list[bool]:
    """Whether each of these streams came to its end."""
    return [one.result(timeout=180) for one in whole]


def hold_to_the_page(event: str, outcomes: list, since_s: float, whole: list[bool]) -> None:
    """Report what an event cost, and hold it to the page's row of it."""
    [text] = [cell.source for cell in read_notebook("next_steps.ipynb").cells if cell.id == "about-nodes"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    [(_, cut, new, _)] = [row for row in rows if row[0] == event]
    failed = report(event, outcomes, since_s)
    late_s = sorted(one[0] - since_s for one in failed if one[0] >= since_s)
    broke = len(failed) - len(late_s)
    print(
        f"  {broke} of those requests were under way, {len(late_s)} began {[round(one, 1) for one in late_s]} s later"
    )
    print(f"  {whole.count(False)} of {len(whole)} streams broke")
    if cut == "all finish":
        assert not broke and all(whole), (failed, whole)
    if rare := re.fullmatch(r"fewer than 1 in (\d+) fail", new):
        assert len(late_s) * int(rare[1]) < len(outcomes), f"The page says: {new}. Failed: {failed}"
    else:
        fail_for_s = 0 if new == "none fails" else float(re.fullmatch(r"fail for up to (\d+) seconds", new)[1])
        assert not late_s or late_s[-1] <= fail_for_s, f"The page says: {new}. Failed: {failed}"


def test_killed_node_takes_its_own_streams_only(served):
    stays, goes = served.workers
    with under_way(stays.url, served.url) as (whole, outcomes, happens):
        killed_s = time.monotonic()
        happens()
        goes.kill()
        wait_for(lambda: goes.address not in served.nodes(), "cluster that noticed", 60)
        print(f"The cluster noticed {time.monotonic() - killed_s:.0f} s after the node was killed")
        time.sleep(10)
        whole = settled(whole)
    hold_to_the_page("a node dies", outcomes, killed_s, whole)
    assert set(whole) == {True, False}, "Some of the streams were on the replica that died, some on the other"


def test_node_that_is_asked_to_leave_finishes_what_it_has(served, cell):
    """SIGTERM, as when Kubernetes deletes a pod: answers under way finish, and the probe tells the balancer."""
    assert "`SIGTERM`, one node at a time, and wait for its replica | fewer than 1 in 100 |" in cell("updates")
    _, goes = served.workers
    with under_way(goes.url, served.url) as (whole, outcomes, happens):
        asked_s, said = time.monotonic(), []
        happens()
        goes.terminate()
        while goes.runs() and time.monotonic() < asked_s + 240:
            said += [one] if (one := served.health(goes)) not in said[-1:] else []
            time.sleep(0.5)
        assert not goes.runs(), "It didn't leave"
        print(f"The node left {time.monotonic() - asked_s:.0f} s after it was asked to; its probe said {said}")
        time.sleep(3)
        whole = settled(whole)
    hold_to_the_page("a node is asked to leave, with `SIGTERM`", outcomes, asked_s, whole)
    # On a busy machine, the probe may time out in between.
    assert said[0] == 200 and 503 in said and 200 not in said[said.index(503) :], said


def test_drained_node_hands_over_its_replica(served):
    """`ray drain-node` of the only replica's node: the replica comes up on the other node first.

    Meanwhile no worker passes the probe, so the balancer needs the head.
    """
    served.deploy(1)
    wait_for(lambda: served.replicas() == ["RUNNING"], "one replica", 180)
    [goes] = [host for host in served.workers if host.processes(REPLICA)]
    [other] = [host for host in served.workers if host is not goes]
    # Two engines that poll leave a command 3 % of a core on a small machine: several minutes for its imports.
    drain = ["chrt", "--rr", "1", "ray", "drain-node", f"--address={served.head.address}:6379"]
    drain += ["--deadline-remaining-seconds=400"]
    drain += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=maintenance"]
    drain += [f"--node-id={served.nodes()[goes.address]}"]
    with under_way(goes.url, served.url) as (whole, outcomes, happens):
        drained_s, only_head_s = time.monotonic(), []
        result = served.head.run(*drain, timeout_s=120)
        happens()
        assert result.returncode == 0, result.stdout

        def moved() -> bool:
            if 200 not in {served.health(host) for host in served.workers}:
                only_head_s.append(round(time.monotonic() - drained_s))
            return served.serves(other)

        wait_for(moved, "replica on the other node", 240)
        print(f"The replica had moved {time.monotonic() - drained_s:.0f} s after `ray drain-node`")
        assert only_head_s, "A worker passed the probe all the time"
        print(f"  no worker passed the probe from second {only_head_s[0]} to {only_head_s[-1]}")
        wait_for(lambda: goes.address not in served.nodes(), "end of the drained node", 240)
        print(f"The node was gone {time.monotonic() - drained_s:.0f} s after it. `ray start` runs: {goes.runs()}")
        time.sleep(3)
        whole = settled(whole)
    hold_to_the_page("a node is drained, with `ray drain-node`", outcomes, drained_s, whole)
    assert goes.runs() and not goes.processes("ray::"), "Ray's processes are gone, `ray start --block` isn't"


def test_node_that_is_cut_off_fails_requests_until_ray_drops_it(served):
    """Nobody is told, so connections to it hang until somebody gives up: here, clients after ten seconds."""
    stays, goes = served.workers
    with under_way(stays.url, served.url, timeout_s=10) as (whole, outcomes, happens):
        cut_s = time.monotonic()
        happens()
        goes.cut_off()
        wait_for(lambda: goes.address not in served.nodes(), "cluster that noticed", 120)
        print(f"The cluster noticed {time.monotonic() - cut_s:.0f} s after the cut")
        time.sleep(10)
        whole = settled(whole)
    hold_to_the_page("a node is cut off", outcomes, cut_s, whole)
    assert set(whole) == {True, False}, "Some of the streams were on the replica that was cut off, some on the other"
    goes.mend()
    wait_for(lambda: not goes.runs(), "end of the node that was cut off", 120)
    print(f"  it ended by itself {time.monotonic() - cut_s:.0f} s after the cut")


def test_head_that_dies_takes_the_cluster_with_it(served, cell):
    """Without fault tolerance of its control store: replicas go on until their raylets give up on the head."""
    lasts_s = float(re.search(r"After (\d+) seconds without a head, the other nodes leave", cell("about-nodes"))[1])
    [stays, _] = served.workers
    with calm_load(served.url) as outcomes:
        time.sleep(2)
        killed_s = time.monotonic()
        served.head.kill()
        wait_for(lambda: not stays.processes(REPLICA), "end of the replica", 180)
        ended_s = time.monotonic()
        print(f"The replica ended {ended_s - killed_s:.0f} s after the head")
        time.sleep(2)
    assert lasts_s < ended_s - killed_s < lasts_s + 20
    before = [one for one in outcomes if one[1] < killed_s + lasts_s]
    hold_to_the_page("the head dies", before, killed_s, [])
    assert outcomes[-1][2] != 200


@pytest.mark.skipif(not shutil.which("redis-server"), reason="redis-server isn't installed")
def test_head_whose_state_is_kept_comes_back(cluster, cell):
    """With the control store in a Redis: replicas outlive the head, and a new head takes them over."""
    away_s = float(re.search(r"the head was away for (\d+) seconds", cell("about-nodes"))[1])
    serves, joins = cluster.workers
    for host in cluster.hosts:
        host.kill()
    kept = cluster.start_redis()
    patient = {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}  # What KubeRay sets on workers
    cluster.start(cluster.head, **kept)
    cluster.start(serves, **patient)
    wait_for(lambda: len(cluster.nodes()) == 2, "cluster of two nodes", 120)
    cluster.deploy(1)
    wait_for(lambda: cluster.serves(serves), "replica", 300)
    [replica] = serves.processes(REPLICA)
    with under_way(serves.url, cluster.url) as (whole, outcomes, happens):
        killed_s = time.monotonic()
        happens()
        cluster.head.kill()
        time.sleep(away_s)  # Longer than workers wait without the variable
        back_s = time.monotonic()
        cluster.start(cluster.head, **kept)
        wait_for(lambda: cluster.serves(serves), "head that took the replica over", 180)
        print(f"The new head had taken the replica over {time.monotonic() - back_s:.0f} s after its start")
        time.sleep(10)
        whole = settled(whole)
    hold_to_the_page("the head dies, and its state is in a Redis", outcomes, killed_s, whole)
    assert [one.pid for one in serves.processes(REPLICA)] == [replica.pid], "Another replica"
    cluster.start(joins, **patient)
    cluster.deploy(2)
    wait_for(lambda: cluster.serves(*cluster.workers), "replica on a node that joined", 300)
