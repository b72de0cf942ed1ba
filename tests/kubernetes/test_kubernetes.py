"""The manifests are what the operators' schemas say, and the program does what TF_CONFIG says."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

from syncbn.doctor.cluster import read_cluster
from tests.kubernetes.tfjob_pods import configurations, free_port

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "examples" / "kubernetes"
SCHEMA = json.loads((HERE / "tfjob.json").read_text())
TFJOB, *OTHERS = yaml.safe_load_all((FOLDER / "tfjob.yaml").read_text())
TRAINJOB = yaml.safe_load((FOLDER / "trainjob.yaml").read_text())
SPECS = TFJOB["spec"]["tfReplicaSpecs"]
VERSION = kubernetes_validate.latest_version()


def check_tfjob(job):
    jsonschema.validate(job, SCHEMA)
    for spec in job["spec"]["tfReplicaSpecs"].values():
        pod = {"apiVersion": "v1", "kind": "Pod", **spec["template"]}
        kubernetes_validate.validate(pod, VERSION, strict=True)
        # The operator finds its container and its port by these names.
        (container,) = [one for one in pod["spec"]["containers"] if one["name"] == "tensorflow"]
        assert "restartPolicy" not in pod["spec"]  # the operator overwrites it
        assert [port["containerPort"] for port in container["ports"]] == [2222]


def check_trainjob(job):
    """A field that the model does not know is lost on the way through it."""
    assert TrainerV1alpha1TrainJob.from_dict(copy.deepcopy(job)).to_dict() == job


def test_the_manifests_are_valid():
    check_tfjob(TFJOB)
    check_trainjob(TRAINJOB)
    assert {one["kind"] for one in OTHERS} == {"NetworkPolicy", "PersistentVolumeClaim"}
    for other in OTHERS:
        kubernetes_validate.validate(other, VERSION, strict=True)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "tfReplicaSpec"), {}),
        (("spec", "runPolicy", "cleanPodsPolicy"), "All"),
        (("spec", "tfReplicaSpecs", "Chef"), SPECS["Chief"]),
        (("spec", "tfReplicaSpecs", "Worker", "restartPolicy"), "OnFailing"),
        (("spec", "tfReplicaSpecs", "Worker", "template", "spec", "volume"), []),
    ],
)
def test_a_slip_in_the_tfjob_is_seen(path, value):
    job = copy.deepcopy(TFJOB)
    place = job
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check_tfjob(job)


@pytest.mark.parametrize("path", [("spec", "trainers"), ("spec", "trainer", "numNode")])
def test_a_slip_in_the_trainjob_is_seen(path):
    job = copy.deepcopy(TRAINJOB)
    place = job
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = 2
    with pytest.raises((AssertionError, ValueError)):
        check_trainjob(job)


def test_slips_in_the_others_are_seen():
    for other in OTHERS:
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate({**other, "specs": {}}, VERSION, strict=True)


def test_the_network_policy_lets_the_jobs_own_pods_in_and_no_other():
    (policy,) = [one["spec"] for one in OTHERS if one["kind"] == "NetworkPolicy"]
    labels = {tuple(spec["template"]["metadata"]["labels"].items()) for spec in SPECS.values()}
    assert labels == {tuple(policy["podSelector"]["matchLabels"].items())}
    assert policy["ingress"] == [{"from": [{"podSelector": policy["podSelector"]}]}]
    assert policy["policyTypes"] == ["Ingress"]


def test_the_volume_that_pods_mount_is_claimed():
    (claim,) = [one for one in OTHERS if one["kind"] == "PersistentVolumeClaim"]
    for spec in SPECS.values():
        (volume,) = spec["template"]["spec"]["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_the_image_has_what_the_jobs_run():
    text = (FOLDER / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    known = {"FROM", "RUN", "USER", "WORKDIR", "COPY", "ENV", "ENTRYPOINT", "CMD"}
    assert {line.split()[0] for line in lines} <= known
    (base,) = [line.split()[1] for line in lines if line.startswith("FROM ")]
    assert re.fullmatch(r"python:3\.1[123]-slim", base)
    for line in lines:
        if line.startswith("COPY "):
            assert (ROOT / line.split()[1]).is_file()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users == ["1000"]
    images = {c["image"] for s in SPECS.values() for c in s["template"]["spec"]["containers"]}
    assert images == {TRAINJOB["spec"]["trainer"]["image"]}
    assert not any(image.endswith(":latest") or ":" not in image for image in images)


def service(kind, index):
    return f"digits-{kind}-{index}.default.svc:2222"


def test_the_doctor_understands_what_the_operator_writes():
    counts = {kind: spec["replicas"] for kind, spec in SPECS.items()}
    every = configurations(counts, service)
    assert [*every] == ["chief 0", "worker 0", "worker 1", "evaluator 0"]
    for name, config in every.items():
        cluster = read_cluster({"TF_CONFIG": json.dumps(config)})
        assert not cluster.findings
        expected = {"chief 0", "worker 0", "worker 1"} - {name}
        assert {*cluster.peers} == expected
        assert cluster.own == (None if name == "evaluator 0" else service(*name.split()))


def program(*command, folder, **environment):
    result = subprocess.run(
        ["timeout", "-k", "5", "200", sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    assert result.returncode == 0, result.stdout + result.stderr[-6000:]
    return result.stdout


@pytest.mark.multiprocess
def test_chief_and_worker_train_one_model_which_the_evaluator_evaluates(tmp_path):
    specs = {"Chief": 1, "Worker": 1, "Evaluator": 1}
    train = (FOLDER / "train.py", "--folder", tmp_path / "shared", "--epochs", 4)
    printed = program(HERE / "tfjob_pods.py", json.dumps(specs), *train, folder=tmp_path)
    sums = dict(re.findall(r"^(chief|worker) 0: the sum of the weights is (.*)$", printed, re.M))
    assert {*sums} == {"chief", "worker"}
    assert sums["chief"] == sums["worker"]
    accuracies = re.findall(r"^epoch-(\d+): accuracy ([\d.]+)$", printed, re.M)
    assert [int(epoch) for epoch, _ in accuracies] == [1, 2, 3, 4]
    assert float(accuracies[-1][1]) > 0.25  # by chance 0.1; six runs had 0.47 to 0.56


@pytest.mark.engines
@pytest.mark.multiprocess
def test_torchrun_trains_as_the_trainjob_has_it(tmp_path):
    """By the variables of torchrun that the Trainer sets in the pods: here of one node."""
    trainer = TRAINJOB["spec"]["trainer"]
    assert trainer["command"] == ["torchrun", "train.py"]
    printed = program(
        *("-m", "torch.distributed.run", FOLDER / "train.py"),
        *("--folder", tmp_path / "shared"),
        folder=tmp_path,
        KERAS_BACKEND="torch",
        PET_NNODES="1",
        PET_NPROC_PER_NODE="2",
        PET_NODE_RANK="0",
        PET_MASTER_ADDR="127.0.0.1",
        PET_MASTER_PORT=free_port().rpartition(":")[2],
    )
    sums = re.findall(r"^worker (\d): the sum of the weights is (.*)$", printed, re.M)
    assert {rank for rank, _ in sums} == {"0", "1"}
    assert len({total for _, total in sums}) == 1
    assert len([*(tmp_path / "shared").glob("epoch-*.keras")]) == 10


@pytest.mark.multiprocess
def test_an_evaluator_whose_training_never_comes_says_so_and_ends(tmp_path):
    config = {"cluster": {"worker": ["a:1"]}, "task": {"type": "evaluator", "index": 0}}
    result = subprocess.run(
        [sys.executable, FOLDER / "train.py", "--folder", tmp_path, "--patience", "0.1"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "TF_CONFIG": json.dumps(config), "KERAS_BACKEND": "jax"},
    )
    assert result.returncode == 1
    assert "no checkpoint in" in result.stderr
