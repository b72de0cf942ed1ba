"""`syncbn launch` under a real mpirun; MPI itself is used by nobody.

Debian: apt-get install openmpi-bin. Where it is missing the tests are skipped, but fail where the
environment has CI. MPICH's mpiexec.hydra is tried where it is.
"""

import json
import re
import shutil
import subprocess
import sys

import pytest

from tests.multiprocess import managers
from tests.multiprocess.cluster import Ended
from tests.multiprocess.launching import START, wait_until

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]
# On the loopback alone; root too, as in containers; with fewer cores than ranks.
MPIRUN = (
    *("mpirun", "--allow-run-as-root", "--oversubscribe"),
    *("--mca", "btl_tcp_if_include", "lo", "--mca", "oob_tcp_if_include", "lo"),
)
HYDRA = ("mpiexec.hydra", "-launcher", "fork")


@pytest.fixture
def mpirun(tmp_path):
    """Runs a command as so many ranks, to its end."""
    if shutil.which("mpirun") is None:
        managers.missing("mpirun")

    def run(ranks, command, environment, seconds=60, manager=MPIRUN):
        ended = subprocess.run(
            [*manager, "-n", str(ranks), *command],
            env=environment,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
        return Ended(ended.returncode, ended.stdout)

    return run


@pytest.fixture
def under(mpirun, launch):
    """Run a program by the launcher as each rank; nothing of it is left at the end."""

    def run(program, *options, before=()):
        one = launch(program, *options)
        ended = mpirun(2, [*before, *one.command], one.environment)
        assert wait_until(lambda: not one.processes(), 10)
        return ended

    return run


def test_ranks_of_mpirun_train_as_one_device(mpirun, tmp_path):
    ended = mpirun(2, managers.command(tmp_path), managers.environment())
    managers.assert_trained_as_one(ended, tmp_path, "tensorflow")
    said = r"syncbn launch: mpirun \(Open MPI\): 2 workers in 2 tasks on 1 node\(s\)"
    assert len(re.findall(said, ended.output)) == 1


@pytest.mark.engines
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_ranks_of_mpirun_train_as_one_device_on_every_backend(mpirun, tmp_path, backend):
    command = managers.command(tmp_path)
    ended = mpirun(2, command, managers.environment(backend), seconds=150)
    managers.assert_trained_as_one(ended, tmp_path, backend)


@pytest.mark.engines
@pytest.mark.skipif(shutil.which(HYDRA[0]) is None, reason="there is no MPICH")
def test_ranks_of_mpich_train_as_one_device(mpirun, tmp_path):
    command = managers.command(tmp_path)
    ended = mpirun(2, command, managers.environment(), manager=HYDRA)
    managers.assert_trained_as_one(ended, tmp_path, "tensorflow")
    assert "mpiexec (MPICH): 2 workers" in ended.output


TELLS = (
    START
    + """
print(json.dumps([os.environ["TF_CONFIG"], os.environ["LOCAL_RANK"]]), flush=True)
"""
)


def told(output):
    """What each worker was told, by its number."""
    lines = re.findall(r"^\[(\d+)\] (\[.*\])$", output, re.MULTILINE)
    return {int(rank): json.loads(line) for rank, line in lines}


def places(found):
    """The workers' addresses, on which all of them agree."""
    (cluster,) = {json.dumps(json.loads(config)["cluster"]) for config, _ in found.values()}
    return json.loads(cluster)["worker"]


def test_ranks_start_several_workers_each(under):
    status, output = under(TELLS, "--workers", "2", "--port", "24000")
    assert status == 0, output
    found = told(output)
    assert [found[rank][1] for rank in range(4)] == ["0", "1", "2", "3"]
    assert places(found) == [f"127.0.0.1:{port}" for port in range(24000, 24004)]


def test_each_rank_may_have_workers_of_its_own(under):
    status, output = under(TELLS, "--cluster", "none", "--workers", "1")
    assert status == 0, output
    assert re.findall(r"^\[(\d)\]", output, re.MULTILINE) == ["0", "0"]


def test_a_rank_that_fails_ends_all(under):
    program = START + "sys.exit(7) if RANK else time.sleep(60)"
    status, output = under(program, "--grace", "1")
    assert status == 7, output
    assert re.search(r"worker 1 \(127\.0\.0\.1:\d+\) ended with exit code 7", output)


def test_ranks_on_several_nodes_ask_for_hosts(under):
    """On nodes of their own as far as the environment tells."""
    alone = ("env", "OMPI_COMM_WORLD_LOCAL_RANK=0", "OMPI_COMM_WORLD_LOCAL_SIZE=1")
    status, output = under(TELLS, before=alone)
    assert status == 2
    assert "on 2 nodes requires their names, which its environment does not tell" in output
    assert "Give --hosts a:port,b:port, one a node" in output
    hosts = "127.0.0.1:24010,127.0.0.1:24020"
    status, output = under(TELLS, "--hosts", hosts, before=alone)
    assert status == 0, output
    assert places(told(output)) == hosts.split(",")
