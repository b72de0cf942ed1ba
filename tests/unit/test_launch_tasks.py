"""What the launcher makes of the environments of srun, sbatch, mpirun and mpiexec.

The environments are files of tests/unit/environments: each says the command that gave it, and
whether it was recorded or written after documentation.
"""

import argparse
import json
import os
from pathlib import Path

import pytest

from syncbn.cli.launch import add_parser, cluster_settings
from syncbn.errors import InputError
from syncbn.launch import LaunchSettings, clusters, slurm
from syncbn.launch.spec import MARK
from syncbn.launch.tasks import FIRST_PORT, LAST_PORT, PORTS

FOLDER = Path(__file__).parent / "environments"
HERE = "127.0.0.1"
FOUR = ("login1", "n01", "n02", "n03")
# The manager; the nodes; the node of each task; the cores of each, where a task may use 4.
CLUSTERS = {
    "srun_one_node": ("slurm", (HERE,), (0, 0), (1, 1)),
    "srun_three_nodes_unequal": ("slurm", FOUR[:3], (0, 0, 0, 1, 2), (1, 1, 1, 1, 1)),
    "srun_four_nodes": ("slurm", FOUR, (0, 0, 1, 1, 2, 2, 3, 3), (1,) * 8),
    "srun_gpus_per_task": ("slurm", FOUR[:2], (0, 0, 1, 1), (1,) * 4),
    "srun_gpus_per_node": ("slurm", FOUR[:2], (0, 0, 1, 1), (1,) * 4),
    "srun_gpu_bind": ("slurm", FOUR[:2], (0, 0, 0, 1), (1,) * 4),
    "srun_cyclic": ("slurm", FOUR[:2], (0, 1, 0, 0), (1,) * 4),
    "srun_plane": ("slurm", FOUR[:2], (0, 0, 1, 1), (1,) * 4),
    "srun_one_task_a_node": ("slurm", FOUR[:2], (0, 1), (4, 4)),
    "srun_heterogeneous": ("slurm", ("n01", "n02"), (0, 0, 1, 1), (1,) * 4),
    "srun_in_array": ("slurm", FOUR[:2], (0, 1, 0, 1), (1,) * 4),
    "srun_in_sbatch_pmi2": ("slurm", FOUR[:2], (0, 0, 1, 1), (2,) * 4),
    "open_mpi_one_node": ("mpi", (HERE,), (0, 0), (4, 4)),  # bound: 4 of the machine's 8
    "open_mpi_in_sbatch": ("mpi", FOUR[:2], (0, 0, 1, 1), (4,) * 4),
    "mpich_one_node": ("mpi", (HERE,), (0, 0), (2, 2)),
    "mpich_in_sbatch": ("mpi", FOUR[:2], (0, 0, 1, 1), (2,) * 4),
}
ALONE = (
    "sbatch_script",
    "sbatch_array_script",
    "salloc_shell",
    "salloc_interactive_step",
    "srun_one_task_of_job",
)
# The GPUs of each task's worker, by the number that each of them sees.
GPUS = {
    "srun_gpus_per_task": ["0,1", "2,3", "0,1", "2,3"],
    "srun_gpus_per_node": ["0,1", "2,3", "0,1", "2,3"],
    "srun_gpu_bind": ["0", "1", "0", "0,1"],
    "srun_in_array": ["0,1", "0,1", "2,3", "2,3"],
}


def environments(name):
    """Of all tasks, in the order of their numbers."""
    found = json.loads((FOLDER / f"{name}.json").read_text())
    assert isinstance(found["recorded"], bool)
    return [{**found["of_all"], **own} for own in found["of_each"]]


def task_of(environment, cores=4, machine_cores=8, host_name="nowhere", **options):
    options.setdefault("cluster", clusters.detected(environment))
    options.setdefault("workers", 1)
    settings = LaunchSettings(**options)
    settings.check()
    return clusters.find_task(environment, settings, cores, machine_cores, host_name)


@pytest.mark.parametrize("name", CLUSTERS)
def test_all_tasks_find_the_same_cluster_and_each_its_own_place(name):
    cluster, nodes, node_of, cores = CLUSTERS[name]
    found = environments(name)
    assert {clusters.detected(one) for one in found} == {cluster}
    tasks = [task_of(one) for one in found]
    assert [task.rank for task in tasks] == list(range(len(node_of)))
    assert {task.nodes for task in tasks} == {nodes}
    assert {task.node_of for task in tasks} == {node_of}
    assert tuple(task.cores for task in tasks) == cores
    assert len({task.block for task in tasks}) == 1
    settings = LaunchSettings(workers=2, cluster=cluster)
    (spec,) = {clusters.spec_of(task, settings) for task in tasks}
    assert len({*spec.addresses, spec.rendezvous}) == 2 * len(node_of) + 1
    for task in tasks:
        for index in (2 * task.rank, 2 * task.rank + 1):
            assert spec.addresses[index].startswith(f"{nodes[node_of[task.rank]]}:")


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_gpus_that_srun_shared_out_are_not_divided_again(name, backend, monkeypatch):
    shares = [environment_of_worker(one, backend, monkeypatch) for one in environments(name)]
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == GPUS[name]


@pytest.mark.parametrize(
    ("name", "ranks"),
    [("srun_gpus_per_task", "0000"), ("srun_gpus_per_node", "0101"), ("srun_cyclic", "0012")],
)
def test_torch_chooses_by_a_local_rank_among_the_gpus_that_it_sees(name, ranks, monkeypatch):
    found = [environment_of_worker(one, "torch", monkeypatch) for one in environments(name)]
    assert "".join(one["LOCAL_RANK"] for one in found) == ranks


def environment_of_worker(environment, backend, monkeypatch):
    """What the supervisor gives the first worker of a task."""
    from syncbn.launch import supervisor

    task = task_of(environment)
    settings = LaunchSettings(workers=1, cluster=clusters.detected(environment), backend=backend)
    order = supervisor.Order(["true"], settings, "mark")
    monkeypatch.setattr(os, "environ", environment)
    one = supervisor._Supervisor(order, None, None, "tasks", task)
    return one._environment(clusters.spec_of(task, settings), task.rank, 0)


@pytest.mark.parametrize("name", ALONE)
def test_a_shell_a_script_and_an_only_task_are_no_cluster(name):
    for environment in environments(name):
        assert clusters.detected(environment) == "none"
        # One of these is asked for by --cluster slurm.
        assert slurm.is_step(environment) == (name == "srun_one_task_of_job")


def test_every_recorded_environment_is_one_of_a_test():
    others = {"srun_arbitrary", "open_mpi_by_node", "open_mpi_two_nodes", "intel_two_nodes"}
    names = {file.stem for file in FOLDER.glob("*.json")}
    assert names == {*CLUSTERS, *ALONE, *others}


def test_mpi_on_several_nodes_asks_for_the_hosts_and_takes_them():
    for name, said in (("open_mpi_two_nodes", "Open MPI"), ("intel_two_nodes", "Intel MPI")):
        for rank, environment in enumerate(environments(name)):
            with pytest.raises(InputError, match=rf"{said}.* on 2 nodes requires their names"):
                task_of(environment)
            options = {"cluster": "mpi", "hosts": "a:4000,b:5000"}
            task = task_of(environment, **options)
            spec = clusters.spec_of(task, LaunchSettings(workers=1, **options))
            assert spec.addresses == ("a:4000", "a:4001", "b:5000", "b:5001")
            assert spec.rendezvous == "a:4002"
            assert spec.environment(task.rank)["LOCAL_RANK"] == str(rank % 2)
            assert task.cores == 4  # bound


def test_cores_that_others_are_bound_to_as_well_are_shared():
    """Open MPI binds more than two ranks to the sockets, two of a machine with 12 cores here."""
    ranks = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    bound = changed("open_mpi_one_node", **ranks)
    assert task_of(bound, cores=6, machine_cores=12).cores == 3
    assert task_of(bound, cores=1, machine_cores=12).cores == 1
    # Nothing was bound, whatever it says.
    assert task_of(bound, cores=12, machine_cores=12).cores == 3
    del bound["OMPI_MCA_orte_bound_at_launch"]
    assert task_of(bound, cores=8, machine_cores=12).cores == 2
    step = changed("srun_one_task_a_node")
    assert task_of(step, cores=3).cores == 3
    step.pop("SLURM_CPUS_PER_TASK")
    assert task_of(step, cores=2).cores == 2


def test_hosts_of_another_number_than_the_nodes_are_refused():
    for name in ("open_mpi_two_nodes", "srun_gpus_per_node"):
        with pytest.raises(InputError, match=r"runs on 2 node\(s\), and --hosts requires one"):
            task_of(environments(name)[0], hosts="a:4000")


def test_ranks_that_do_not_follow_each_other_are_refused_by_one_of_them():
    """Rank 0 is where it would be anyway."""
    refused = []
    for environment in environments("open_mpi_by_node"):
        try:
            task_of(environment)
        except InputError as error:
            refused.append(str(error))
    assert refused
    assert all("--map-by slot" in one for one in refused)


def test_a_rank_on_another_node_than_supposed_is_refused():
    environment = environments("open_mpi_in_sbatch")[2]
    with pytest.raises(InputError, match=r"rank 2 is on n01\. Received: it is on n07"):
        task_of({**environment, "SLURMD_NODENAME": "n07"})
    task_of({**environment, "SLURMD_NODENAME": "n01.of.a.domain"})
    environment = {**environments("intel_two_nodes")[3], "SLURM_JOB_NODELIST": "a,b"}
    environment["SLURM_JOB_ID"] = "7"
    with pytest.raises(InputError, match=r"rank 3 is on b\. Received: it is on a"):
        task_of(environment, host_name="a")
    assert task_of(environment, host_name="b").nodes == ("a", "b")


def changed(name, rank=1, **variables):
    return {**environments(name)[rank], **variables}


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (changed("srun_one_node", SLURM_PROCID="2"), "SLURM_PROCID=2 of 2 tasks"),
        (changed("srun_one_node", SLURM_PROCID="-1"), "SLURM_PROCID requires a whole number"),
        (changed("srun_one_node", SLURM_STEP_NUM_TASKS="3"), "numbers agree. Received: 3 tasks"),
        (changed("srun_one_node", SLURM_STEP_NUM_TASKS="x"), "SLURM_STEP_NUM_TASKS requires"),
        (changed("srun_one_node", SLURM_STEP_NODELIST="n[01-"), r"Received: 'n\[01-'"),
        (changed("srun_one_node", SLURM_STEP_NODELIST=""), "A list of Slurm's nodes requires"),
        (changed("srun_one_node", SLURM_STEP_NODELIST="a,b"), r"the 2 node\(s\) a, b"),
        (changed("srun_one_node", SLURM_STEP_TASKS_PER_NODE="2(y3)"), "PER_NODE requires counts"),
        (changed("srun_one_node", SLURM_LOCALID="0"), "SLURM_LOCALID=1. Received: '0'"),
        (changed("srun_cyclic", SLURM_DISTRIBUTION="block"), "SLURM_NODEID=0. Received: '1'"),
        (changed("srun_gpus_per_node", 0, SLURM_GTIDS="0,2"), "SLURM_GTIDS=0,1. Received: '0,2'"),
        (changed("srun_arbitrary", 0), "by block, cyclic or plane.* Received: .*'arbitrary'"),
        (changed("open_mpi_one_node", OMPI_COMM_WORLD_RANK="2"), "RANK=2 of 2"),
        (changed("open_mpi_one_node", OMPI_COMM_WORLD_SIZE="two"), "a whole number from 1"),
        (changed("mpich_one_node", MPI_LOCALRANKID="2"), "MPI_LOCALRANKID=2 of 2"),
        (changed("open_mpi_in_sbatch", OMPI_COMM_WORLD_SIZE="5"), "the same number of ranks"),
    ],
)
def test_environments_that_contradict_themselves_are_refused(environment, words):
    with pytest.raises(InputError, match=words):
        task_of(environment)


def test_what_is_asked_for_and_not_there_is_refused():
    with pytest.raises(InputError, match="--cluster slurm requires a step of Slurm"):
        task_of(environments("sbatch_script")[0], cluster="slurm")
    with pytest.raises(InputError, match="--cluster mpi requires the variables of mpirun"):
        task_of({}, cluster="mpi")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ("n1",)),
        ("n[01-03,7],login1", ("n01", "n02", "n03", "n7", "login1")),
        ("n[098-101]", ("n098", "n099", "n100", "n101")),
        ("r[0-1]n[08-10]-ib", tuple(f"r{r}n{n}-ib" for r in (0, 1) for n in ("08", "09", "10"))),
        ("a.b-c,d_e[5]", ("a.b-c", "d_e5")),
    ],
)
def test_lists_of_nodes_are_expanded(text, names):
    assert slurm.node_names(text) == names


@pytest.mark.parametrize(
    "text", ["", ",", "a,", "a,,b", "n[", "n]", "n[]", "n[a-b]", "n[3-1]", "n[1-99999999]", "a,a"]
)
def test_what_is_no_list_of_nodes_is_refused(text):
    with pytest.raises(InputError, match="A list of Slurm's nodes requires"):
        slurm.node_names(text)


def test_counts_of_tasks_are_expanded():
    assert slurm.tasks_per_node("2(x3),1") == (2, 2, 2, 1)
    for text in ("", "0", "2(x0)", "2x3", "1,"):
        with pytest.raises(InputError, match="requires counts"):
            slurm.tasks_per_node(text)


def test_ports_are_below_those_of_outgoing_connections_and_differ_by_job_and_step():
    assert (FIRST_PORT, PORTS, LAST_PORT) == (10000, 32, 31855)
    one = environments("srun_one_node")[0]
    jobs = [changed("srun_one_node", SLURM_JOB_ID=str(9000 + job)) for job in range(600)]
    assert len({task_of(job, workers=1).block for job in jobs}) == 600
    steps = [changed("srun_one_node", SLURM_STEP_ID=str(step)) for step in range(16)]
    following = changed("srun_one_node", SLURM_JOB_ID=str(int(one["SLURM_JOB_ID"]) + 1))
    assert len({task_of(each).block for each in [*steps, following]}) == 17
    # (16 · 23 + 0) mod 683 = 368
    assert one["SLURM_JOB_ID"] == "23"
    assert task_of(one).places(None, 15) == [(HERE, 10000 + 32 * 368)]
    assert task_of(one).places(4000, 15) == [(HERE, 4000)]
    with pytest.raises(InputError, match=r"keeps 31 ports .* Received: 32 workers on one"):
        task_of(one).places(None, 16)


def test_a_run_of_open_mpi_has_ports_of_its_own():
    blocks = {
        task_of(changed("open_mpi_one_node", PMIX_NAMESPACE=str(65536 * run + 1))).block
        for run in range(1, 50)
    }
    assert len(blocks) > 40


def test_ports_that_end_are_refused():
    task = task_of(environments("srun_one_node")[0])
    with pytest.raises(InputError, match=r"Ports end at 65535\. Received: 65536"):
        clusters.spec_of(task, LaunchSettings(workers=1, cluster="slurm", port=65534))


def settings_of(*options, **environment):
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    parsed = parser.parse_args(["launch", *options, "train.py"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", environment)
        return cluster_settings(parsed)


def test_the_command_takes_what_is_said_before_what_it_finds():
    step = environments("srun_gpus_per_node")[1]
    found = settings_of(**step)
    assert (found.cluster, found.workers) == ("slurm", 1)
    assert settings_of("--workers", "4", **step).workers == 4
    assert settings_of("--cluster", "none", **step).cluster == "none"
    explicit = settings_of("--hosts", "a:1,b:1", "--index", "1", **step)
    assert (explicit.cluster, explicit.workers) == ("none", 1)
    assert settings_of("--hosts", "a:1,b:1", **step).cluster == "slurm"
    # A launcher within a worker: the task is that of the launcher which started the worker.
    within = settings_of(**step, **{MARK: "outer"})
    assert (within.cluster, within.workers) == ("none", 2)
    # mpirun within a job of Slurm, whose daemons are tasks of a step.
    assert settings_of(**environments("open_mpi_in_sbatch")[3]).cluster == "mpi"
    only = environments("srun_one_task_of_job")[0]
    assert (settings_of(**only).cluster, settings_of(**only).workers) == ("none", 2)
    asked = settings_of("--cluster", "slurm", **only)
    assert (asked.cluster, asked.workers) == ("slurm", 1)
