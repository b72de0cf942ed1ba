"""`syncbn launch` under a real srun: a cluster of Slurm that lives as long as these tests.

Debian: apt-get install slurm-wlm munge. Where they are missing the tests are skipped, but fail
where the environment has CI.
"""

import json
import os
import re
import shlex
import sys

import pytest

from tests.multiprocess import managers, slurm
from tests.multiprocess.cluster import free_ports
from tests.multiprocess.launching import LISTENS, START, wait_until

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]


@pytest.fixture(scope="module")
def cluster():
    if slurm.missing():
        managers.missing(f"{', '.join(slurm.missing())}")
    made = slurm.Slurm()
    yield made
    made.close()


@pytest.fixture
def under(cluster, launch):
    """Run a program by the launcher under a command of Slurm; nothing of it is left at the end."""

    def run(program, *command, options=(), seconds=40, **environment):
        one = launch(program, *options)
        given = {**one.environment, **environment}
        return cluster.run(*command, *one.command, folder=one.folder, seconds=seconds, **given)

    return run


def on_slurm(cluster, tmp_path, backend, *srun, options=(), ends="", seconds=150):
    command = managers.command(tmp_path, *options, ends=ends)
    given = managers.environment(backend)
    ended = cluster.run("srun", *srun, *command, folder=tmp_path, seconds=seconds, **given)
    managers.assert_trained_as_one(ended, tmp_path, backend)
    return ended.output


def two_places():
    return ",".join(f"127.0.0.1:{port}" for port in free_ports(2))


def test_tasks_of_srun_train_as_one_device(cluster, tmp_path):
    output = on_slurm(cluster, tmp_path, "tensorflow", "-n", "2")
    said = r"syncbn launch: srun step \d+\.0: 2 workers in 2 tasks on 1 node\(s\), 1 thread"
    assert len(re.findall(said, output)) == 1
    assert output.count("listen on all interfaces without authentication") == 1


@pytest.mark.engines
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_tasks_of_srun_train_as_one_device_on_every_backend(cluster, tmp_path, backend):
    on_slurm(cluster, tmp_path, backend, "-n", "2")


@pytest.mark.engines
@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_tasks_on_two_nodes_train_as_one_device(cluster, tmp_path, backend):
    # Both nodes are this machine, so that their ports must differ.
    options = ("--hosts", two_places())
    output = on_slurm(cluster, tmp_path, backend, "-N", "2", "-n", "2", options=options)
    assert "2 workers in 2 tasks on 2 node(s)" in output


@pytest.mark.engines
def test_a_task_whose_worker_is_killed_starts_it_again_and_training_resumes(cluster, tmp_path):
    options = ("--max-restarts", "2", "--timeout", "30")
    output = on_slurm(cluster, tmp_path, "tensorflow", "-n", "2", options=options, ends="dies")
    assert "was killed by SIGKILL" in output
    assert output.count('"restarts": 1') == 2


@pytest.mark.engines
def test_a_job_that_is_requeued_resumes(cluster, tmp_path):
    """Slurm itself waits for two minutes before."""
    command = shlex.join(["srun", "-n", "2", *managers.command(tmp_path, ends="requeued")])
    script = tmp_path / "script.sh"
    script.write_text(f"#!/bin/bash\n{command}\n")
    out = ("-o", str(tmp_path / "out"), "--open-mode=append")
    sbatch = ("sbatch", "--wait", "--requeue", "-n", "2", *out, str(script))
    ended = cluster.run(*sbatch, folder=tmp_path, seconds=280, **managers.environment())
    managers.assert_trained_as_one(ended, tmp_path, "tensorflow")
    assert "CANCELLED" in (tmp_path / "out").read_text()


TELLS = (
    START
    + """
names = "TF_CONFIG", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "OMP_NUM_THREADS"
print(json.dumps({name: os.environ[name] for name in names}), flush=True)
"""
)


def told(output):
    """What each worker was told, by its number."""
    lines = re.findall(r"^\[(\d+)\] (\{.*\})$", output, re.MULTILINE)
    return {int(rank): json.loads(line) for rank, line in lines}


def test_workers_of_tasks_are_told_one_cluster_whatever_the_distribution(under):
    for distribution, machines in (("block", "0011"), ("cyclic", "0101")):
        status, output = under(TELLS, "srun", "-N", "2", "-n", "4", "-m", distribution)
        assert status == 0, output
        found = told(output)
        assert sorted(found) == [0, 1, 2, 3]
        (addresses,) = {
            tuple(json.loads(one["TF_CONFIG"])["cluster"]["worker"]) for one in found.values()
        }
        hosts = [address.partition(":")[0] for address in addresses]
        assert hosts == [f"n{1 + int(machine)}" for machine in machines]
        assert "".join(found[rank]["GROUP_RANK"] for rank in range(4)) == machines
        assert {one["LOCAL_WORLD_SIZE"] for one in found.values()} == {"2"}


def test_a_task_a_node_starts_several_workers(under):
    command = ("srun", "-N", "2", "--ntasks-per-node", "1", "-c", "2")
    status, output = under(TELLS, *command, options=("--workers", "2"))
    assert status == 0, output
    assert "4 workers in 2 tasks on 2 node(s)" in output
    found = told(output)
    assert [found[rank]["LOCAL_RANK"] for rank in range(4)] == ["0", "1", "0", "1"]
    # Each task has so many cores of its node, as far as this machine has them.
    share = max(1, min(2, len(os.sched_getaffinity(0))) // 2)
    assert {one["OMP_NUM_THREADS"] for one in found.values()} == {str(share)}


def test_workers_of_tasks_reach_each_other(under):
    """What listens stands for TensorFlow's server: a worker that is not found would be named."""
    program = LISTENS + "time.sleep(2)"
    status, output = under(program, "srun", "-n", "2", options=("--timeout", "1.2"))
    assert status == 0, output
    assert "Missing" not in output


def test_a_task_that_does_not_come_up_is_named(under):
    program = LISTENS + "if RANK: server.close()\ntime.sleep(60)"
    status, output = under(program, "srun", "-K", "-n", "2", options=("--timeout", "1"))
    assert status != 0
    assert re.search(r"worker 1 \(127\.0\.0\.1:\d+\): Connection refused. Is the launcher", output)


@pytest.mark.engines
def test_a_script_of_sbatch_has_workers_of_its_own(under, tmp_path):
    """Outside of srun its variables speak of a job, and of a task 0 that nobody started."""
    script = tmp_path / "script.sh"
    script.write_text('#!/bin/bash\nexec "$@"\n')
    command = ("sbatch", "--wait", "-N", "2", "-n", "4", "-o", str(tmp_path / "out"), str(script))
    status, output = under(TELLS, *command, options=("--workers", "3"))
    assert status == 0, output
    found = told((tmp_path / "out").read_text())
    assert sorted(found) == [0, 1, 2]
    assert {one["LOCAL_WORLD_SIZE"] for one in found.values()} == {"3"}


def test_the_only_task_has_workers_of_its_own(under):
    status, output = under(TELLS, "srun", "-n", "1", options=("--workers", "2"))
    assert status == 0, output
    assert sorted(told(output)) == [0, 1]
    assert "srun step" not in output


def test_a_worker_that_fails_ends_the_tasks_if_srun_is_told_to(under):
    program = START + "sys.exit(7) if RANK else time.sleep(60)"
    status, output = under(program, "srun", "--kill-on-bad-exit=1", "-n", "2")
    assert status == 143, output  # srun's own is the highest of the tasks' exit codes
    assert re.search(r"worker 1 \(127\.0\.0\.1:\d+\) ended with exit code 7", output)
    assert "task 1: Exited with exit code 7" in output
    assert "task 0: Exited with exit code 143" in output


def test_a_task_starts_its_own_worker_again(under):
    program = START + "print('life', TRY)\nsys.exit(7 if RANK and not TRY else 0)"
    status, output = under(program, "srun", "-n", "2", options=("--max-restarts", "1"))
    assert status == 0, output
    lives = sorted(re.findall(r"\[\d\] life \d", output))
    assert lives == ["[0] life 0", "[1] life 0", "[1] life 1"]


SAVES = (
    START
    + """
def save(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(0.5)
    pathlib.Path(f"saved{RANK}").touch()
    sys.exit()
signal.signal(signal.SIGTERM, save)
subprocess.Popen(["sleep", "60"], start_new_session=True)
ready()
time.sleep(60)
"""
)


def test_a_step_that_is_cancelled_may_save_and_leaves_nothing(cluster, launch):
    one = launch(SAVES)
    cancels = "until [ -e ready0-0 ] && [ -e ready1-0 ]; do sleep 0.1; done; scancel --name=gone"
    command = f"({cancels}) & exec srun --job-name=gone -n 2 {shlex.join(one.command)}"
    ended = cluster.run("bash", "-c", command, folder=one.folder, **one.environment)
    assert "interrupted by SIGTERM; all workers have ended" in ended.output
    assert sorted(file.name for file in one.folder.glob("saved*")) == ["saved0", "saved1"]
    assert wait_until(lambda: not one.processes(), 10)


def test_what_contradicts_itself_is_said_once_by_each_task(under):
    options = ("--hosts", "127.0.0.1:4000,127.0.0.1:5000")
    status, output = under(TELLS, "srun", "-n", "2", options=options)
    assert status == 2
    assert output.count("syncbn: error: srun step") == 2
    assert "runs on 1 node(s), and --hosts requires one address of each" in output
    assert not told(output)


def test_a_port_that_another_has_is_said(under):
    program = LISTENS + "time.sleep(60)"
    (port,) = free_ports(1)
    wrapped = (
        "import socket, subprocess, sys; one = socket.create_server(('', int(sys.argv[1])));"
        "sys.exit(subprocess.run(sys.argv[2:]).returncode)"
    )
    command = (sys.executable, "-c", wrapped, str(port), "srun", "-K", "-n", "2")
    status, output = under(program, *command, options=("--port", str(port)))
    assert status != 0
    assert "task 0: Exited with exit code 2" in output
    assert f"here {port}. Received: {os.strerror(98)}: somebody on this machine" in output
