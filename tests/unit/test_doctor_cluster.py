"""What the doctor says of TF_CONFIG and its like, and of workers that answer, or do not."""

import json
import socket
import time

import pytest

from syncbn.doctor import peers
from syncbn.doctor.cluster import read_cluster
from syncbn.launch.spec import ClusterSpec

TWO = {"worker": ["10.0.0.1:4000", "10.0.0.2:4000"]}
FIRST = {"type": "worker", "index": 0}


def errors(**variables):
    found = read_cluster(variables).findings
    return [finding for finding in found if finding.level == "error"]


def test_no_variables_no_cluster():
    for variables in ({}, {"TF_CONFIG": ""}, {"TF_CONFIG": "{}"}, {"RANK": "0"}):
        cluster = read_cluster(variables)
        assert (cluster.peers, cluster.own, cluster.meeting) == ({}, None, {})
        assert cluster.findings == ()


@pytest.mark.parametrize("index", [0, 1, "1"])
def test_a_right_one_is_read(index):
    task = {"type": "worker", "index": index}
    cluster = read_cluster({"TF_CONFIG": json.dumps({"cluster": TWO, "task": task})})
    assert cluster.findings == ()
    other = 1 - int(index)
    assert cluster.peers == {f"worker {other}": f"10.0.0.{other + 1}:4000"}
    assert cluster.own == f"10.0.0.{int(index) + 1}:4000"


def test_what_the_launcher_sets_is_right():
    spec = ClusterSpec.on_hosts(("10.0.0.1:4000", "[fe80::1]:4000"))
    for index in range(2):
        cluster = read_cluster(dict(spec.environment(index)))
        assert cluster.findings == ()
        assert cluster.meeting == {
            "KERAS_DISTRIBUTION_JOB_ADDRESSES": spec.rendezvous,
            "MASTER_ADDR": spec.rendezvous,
        }
        assert len(cluster.peers) == 1


def test_an_evaluator_is_none_of_the_cluster():
    config = {"cluster": TWO, "task": {"type": "evaluator", "index": 0}}
    cluster = read_cluster({"TF_CONFIG": json.dumps(config)})
    assert cluster.findings == ()
    assert cluster.own is None
    assert len(cluster.peers) == 2


def config(cluster=TWO, task=FIRST):
    return json.dumps({"cluster": cluster, "task": task})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{'cluster': 1}", "It is no JSON"),
        ("[1]", "requires an object. Received: [1]"),
        ('{"task": {"type": "worker", "index": 0}}', "requires `cluster`. Received: nothing"),
        (config(cluster={}), "requires `cluster`"),
        (config(cluster={"worker": []}), "cluster.worker requires a list"),
        (config(cluster={"worker": "10.0.0.1:4000"}), "cluster.worker requires a list"),
        (config(task=None), "requires `task`"),
        (config(task={"type": "worker"}), "requires `task`, with `type` and `index`"),
        (config(task={"type": "worker", "index": "one"}), "task.index requires a number"),
        (config(task={"type": "worker", "index": 2}), "worker 2, which is not in the cluster"),
        (config(task={"type": "chief", "index": 0}), "chief 0, which is not in the cluster"),
        (config({"worker": ["a:1", "a:1"]}), "worker 0, worker 1 have the same address"),
        (config({"chief": ["a:1"], "worker": ["a:1"]}), "have the same address, a:1"),
        (config({"worker": ["a"]}), "has no port"),
        (config({"worker": [":1"]}), "has no host"),
        (config({"worker": ["a:0"]}), "has no port from 1 to 65535"),
        (config({"worker": ["a:65536"]}), "has no port from 1 to 65535"),
        (config({"worker": ["a:http"]}), "has no port from 1 to 65535"),
        (config({"worker": ["grpc://a:1"]}), "is a URL"),
        (config({"worker": ["fe80::1:4000"]}), "IPv6 address without brackets"),
        (config({"worker": ["localhost:1", "10.0.0.2:1"]}), "each machine's own"),
        (config({"worker": ["10.0.0.1:1", "127.0.0.1:1"]}), "each machine's own"),
    ],
)
def test_a_wrong_tf_config_is_one_error_that_names_it(text, said):
    (error,) = errors(TF_CONFIG=text)
    assert error.about == "TF_CONFIG"
    assert said in error.says
    assert error.do


def test_parameter_servers_are_warned_of():
    cluster = {**TWO, "ps": ["10.0.0.3:4000"]}
    (finding,) = read_cluster({"TF_CONFIG": config(cluster)}).findings
    assert finding.level == "warning"
    assert "no layer can synchronize" in finding.says


@pytest.mark.parametrize(
    ("variables", "about"),
    [
        ({"KERAS_DISTRIBUTION_NUM_PROCESSES": "2"}, ["JOB_ADDRESSES", "PROCESS_ID"]),
        (
            {
                "KERAS_DISTRIBUTION_JOB_ADDRESSES": "a:1",
                "KERAS_DISTRIBUTION_NUM_PROCESSES": "2",
                "KERAS_DISTRIBUTION_PROCESS_ID": "2",
            },
            ["PROCESS_ID"],
        ),
        (
            {
                "KERAS_DISTRIBUTION_JOB_ADDRESSES": "a",
                "KERAS_DISTRIBUTION_NUM_PROCESSES": "two",
                "KERAS_DISTRIBUTION_PROCESS_ID": "1",
            },
            ["NUM_PROCESSES", "JOB_ADDRESSES"],
        ),
        ({"MASTER_ADDR": "a"}, ["MASTER_PORT", "RANK", "WORLD_SIZE"]),
        (
            {"MASTER_ADDR": "a", "MASTER_PORT": "x", "RANK": "3", "WORLD_SIZE": "2"},
            ["RANK", "MASTER_ADDR"],
        ),
    ],
)
def test_wrong_variables_of_jax_and_torch_are_named(variables, about):
    assert [error.about.removeprefix("KERAS_DISTRIBUTION_") for error in errors(**variables)] == (
        about
    )


def cluster_of(*addresses, own=0):
    variables = {"TF_CONFIG": config({"worker": list(addresses)}, {"type": "worker", "index": own})}
    return read_cluster(variables)


def test_each_other_worker_is_called_and_named():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and does not listen
        there = f"127.0.0.1:{server.getsockname()[1]}"
        not_yet = f"127.0.0.1:{silent.getsockname()[1]}"
        answers, findings = peers.call_all(cluster_of("127.0.0.1:9", there, not_yet), 2.0)
    assert answers[f"worker 1 ({there})"] == "listens"
    assert answers[f"worker 2 ({not_yet})"] == "refused"
    assert "worker 0 (127.0.0.1:9)" not in answers
    said = {(finding.level, finding.says) for finding in findings}
    assert ("note", f"worker 1 ({there}) listens.") in said
    assert any(level == "warning" and "A server listens" in says for level, says in said)
    assert any("let a firewall" in finding.do for finding in findings)
    assert not any(level == "error" for level, _ in said)


def test_a_host_that_does_not_exist_is_an_error():
    _, findings = peers.call_all(cluster_of("127.0.0.1:9", "no-such-host.invalid:4000"), 2.0)
    (error,) = [finding for finding in findings if finding.level == "error"]
    assert "worker 1 (no-such-host.invalid:4000)" in error.says


def test_who_does_not_answer_is_waited_for_once_and_not_longer(monkeypatch):
    """Neither connections nor names, for which there is no timeout, hold the doctor up."""

    def never(*_):
        time.sleep(60)

    monkeypatch.setattr(peers, "call", never)
    monkeypatch.setattr(peers, "_FOR_NAMES", 0.1)
    started = time.monotonic()
    answers, findings = peers.call_all(cluster_of(*(f"10.0.0.{n}:4000" for n in range(1, 9))), 0.2)
    assert time.monotonic() - started < 5
    assert len(answers) == 8
    assert {finding.level for finding in findings} == {"error"}


def test_somebody_at_this_tasks_own_address_is_warned_of():
    with socket.create_server(("127.0.0.1", 0)) as server:
        own = f"127.0.0.1:{server.getsockname()[1]}"
        answers, findings = peers.call_all(cluster_of(own, "127.0.0.1:9"), 2.0)
    assert answers[f"this task itself ({own})"] == "listens"
    assert any("own address" in finding.says for finding in findings)
