"""Who is missing in a cluster, who reaches it from outside, and clusters of several machines."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from tests.multiprocess.cluster import ROOT, free_ports
from tests.multiprocess.launching import LISTENS, START, all_ready, wait_until

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]


def test_a_worker_that_never_comes_up_is_named(launch):
    program = LISTENS + "if RANK == 1: server.close(); print('still reading')\ntime.sleep(60)"
    result = launch(program, "--workers", "3", "--timeout", "1.5").run(20)
    assert result.returncode == 124
    assert "after 2 s 2 have come up. Missing:" in result.stderr
    assert re.search(
        r"worker 1 \(127\.0\.0\.1:\d+\): its process runs, and its address answers: "
        "Connection refused",
        result.stderr,
    )
    assert "worker 0 (" not in result.stderr.split("Missing:")[1]
    assert "\n    still reading\n" in result.stderr


def test_programs_that_listen_nowhere_are_never_missing(launch):
    one = launch(START + "time.sleep(2)", "--workers", "2", "--timeout", "0.5")
    assert one.run().returncode == 0


def reachable(address):
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=2):
            return True
    except OSError:
        return False


def can_isolate():
    from syncbn.launch import isolation

    return isolation.why_not() is None


def as_ordinary_user(one):
    """Options to start it as nobody, with a Python and a copy of the package to read."""
    if os.getuid() != 0:
        pytest.skip("this user is an ordinary one")
    nobody = {"user": 65534, "group": 65534, "extra_groups": []}
    for parent in (one.folder, *one.folder.parents[:3]):
        parent.chmod(parent.stat().st_mode | 0o755)
    one.folder.chmod(0o777)
    copy = one.folder / "copy"
    shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__"))
    one.environment["PYTHONPATH"] = str(copy)
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        ask = [python, "-c", "import sys, os; sys.exit(sys.version_info < (3, 11))"]
        try:
            if subprocess.run(ask, check=False, cwd="/", **nobody).returncode == 0:
                one.command[0] = python
                return nobody
        except OSError:
            continue
    pytest.skip("an ordinary user cannot run a Python of this machine")


SERVES = LISTENS + "ready(); print('at', socket.if_nameindex(), flush=True); time.sleep(60)"


@pytest.mark.skipif(not can_isolate(), reason="the kernel allows no network namespace")
@pytest.mark.parametrize("ordinary", [False, True], ids=["this user", "an ordinary user"])
@pytest.mark.parametrize("isolated", [True, False])
def test_workers_are_not_reached_from_outside_their_network(launch, isolated, ordinary):
    one = launch(SERVES, "--workers", "2", *([] if isolated else ["--no-isolate"]))
    process = one.start(**(as_ordinary_user(one) if ordinary else {}))
    assert wait_until(all_ready(one), 10), process.kill() or process.communicate()
    addresses = [address for entry in one.processes() for address in workers_addresses(entry)]
    assert addresses
    assert [reachable(address) for address in addresses] == [not isolated] * len(addresses)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert ("listen on all interfaces without authentication" in output) == (not isolated)
    assert ("in a network of their own" in output) == isolated
    assert ("at [(1, 'lo')]" in output) or not isolated


@pytest.mark.skipif(not can_isolate(), reason="the kernel allows no network namespace")
def test_tensorflows_own_server_is_not_reached_from_outside(launch):
    """It listens on all interfaces although it is told 127.0.0.1: that is why."""
    program = (
        START
        + """
import tensorflow as tf
(address,) = json.loads(os.environ["TF_CONFIG"])["cluster"]["worker"]
server = tf.distribute.Server({"worker": [address]}, job_name="worker", task_index=0)
port = f"{int(address.rpartition(':')[2]):04X}"
for table in ("tcp", "tcp6"):
    for line in open(f"/proc/self/net/{table}"):
        place = line.split()[1]
        if place.endswith(f":{port}") and line.split()[3] == "0A":
            print("listens on all", set(place.split(":")[0]) == {"0"}, flush=True)
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""
    )
    launches = [
        launch(program, "--workers", "1", *options, arguments=(name,))
        for name, options in (("inside", []), ("open", ["--no-isolate"]))
    ]
    processes = [one.start() for one in launches]
    assert wait_until(lambda: all((one.folder / one.command[-1]).exists() for one in launches), 40)
    (inside,), (opened,) = [
        {address for entry in one.processes() for address in workers_addresses(entry)}
        for one in launches
    ]
    assert (reachable(inside), reachable(opened)) == (False, True)
    for process in processes:
        process.send_signal(signal.SIGINT)
        assert "[0] listens on all True" in process.communicate(timeout=20)[0]


def workers_addresses(process):
    with pathlib.Path(f"/proc/{process}/environ").open("rb") as file:
        found = re.search(rb"TF_CONFIG=([^\0]*)", file.read())
    return json.loads(found[1])["cluster"]["worker"] if found else []


def test_several_machines_are_one_cluster(launch):
    ports = free_ports(2)
    hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
    program = LISTENS + "ready(); time.sleep(2.5); print(os.environ['TF_CONFIG'])"
    launchers = [
        launch(program, "--hosts", hosts, "--index", str(index), "--timeout", "10")
        for index in (0, 1)
    ]
    processes = [one.start() for one in launchers]
    outputs = [process.communicate(timeout=30)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    for index, output in enumerate(outputs):
        assert f"1 of 2 workers here, {len(os.sched_getaffinity(0))} thread(s) each" in output
        assert "listen on all interfaces without authentication" in output
        config = json.loads(output.split(f"[{index}] ")[1].splitlines()[0])
        assert config["cluster"]["worker"] == hosts.split(",")
        assert config["task"]["index"] == index


def test_a_machine_that_does_not_come_up_is_named(launch):
    ports = free_ports(2)
    hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
    options = ("--hosts", hosts, "--index", "0", "--timeout", "1")
    result = launch(LISTENS + "time.sleep(60)", *options).run(20)
    assert result.returncode == 124
    assert f"worker 1 (127.0.0.1:{ports[1]}): Connection refused. Is the launcher" in result.stderr
