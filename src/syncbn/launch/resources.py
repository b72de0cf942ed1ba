"""Cores and accelerators, shared between the workers of one machine so that they do not fight."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from syncbn.errors import InputError

__all__ = ["available_cores", "backend", "device_environment", "thread_environment", "visible_gpus"]

BACKENDS = ("tensorflow", "jax", "torch")


def available_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def thread_environment(workers: int, cores: int) -> Mapping[str, str]:
    """Limits for each of so many workers that share the cores; at least one thread each.

    `OMP_NUM_THREADS`: torch, NumPy's BLAS. `TF_NUM_INTRAOP_THREADS`, `TF_NUM_INTEROP_THREADS`:
    TensorFlow; two at least between operations, as one that waits for data must not hold up the
    others. `NPROC`: the thread pool of JAX's CPU client.
    """
    share = max(1, cores // workers)
    return {
        "OMP_NUM_THREADS": str(share),
        "TF_NUM_INTRAOP_THREADS": str(share),
        "TF_NUM_INTEROP_THREADS": str(max(2, share)),
        "NPROC": str(share),
    }


def backend(environment: Mapping[str, str]) -> str:
    """Which backend Keras will take: `KERAS_BACKEND`, else its configuration file's, else TF."""
    if environment.get("KERAS_BACKEND"):
        return environment["KERAS_BACKEND"]
    home = Path(environment.get("KERAS_HOME") or Path.home() / ".keras")
    try:
        configured = json.loads((home / "keras.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or none that Keras could read either
        return "tensorflow"
    return str(configured.get("backend", "tensorflow")) if isinstance(configured, dict) else ""


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """The NVIDIA GPUs that programs would see: by `CUDA_VISIBLE_DEVICES`, else by the driver."""
    if "CUDA_VISIBLE_DEVICES" in environment:
        names = [name.strip() for name in environment["CUDA_VISIBLE_DEVICES"].split(",")]
        # CUDA itself stops at the first name that is none: -1 means that there are no more.
        end = next((i for i, name in enumerate(names) if name in {"", "-1"}), len(names))
        return names[:end]
    try:
        count = len(list(Path("/proc/driver/nvidia/gpus").iterdir()))
    except OSError:
        return []
    return [str(number) for number in range(count)]


def device_environment(
    local_rank: int, workers: int, per_worker: int | None, gpus: list[str], framework: str
) -> Mapping[str, str]:
    """The devices of one worker of a machine.

    With GPUs each worker sees a part of them, as TensorFlow and JAX take all they see; torch's
    programs choose by `LOCAL_RANK` and see all. Without GPUs so many virtual CPU devices:
    `SYNCBN_DEVICES_PER_WORKER` is read by `syncbn.enable_multi_worker()`, `XLA_FLAGS` by JAX.

    Args:
        local_rank: the worker's number on its machine.
        workers: how many share the machine.
        per_worker: devices for each; None for an equal share of the GPUs, or one CPU device.
        gpus: the visible ones.
        framework: Keras's backend.

    Raises:
        InputError: there are not enough GPUs, or torch was asked for several devices a process.
    """
    if framework == "torch":
        if per_worker is not None and per_worker > 1:
            raise InputError(
                "--devices-per-worker with torch requires 1: a process of torch.distributed "
                f"trains on one device. Received: {per_worker}. Give more workers instead."
            )
        return {}
    if not gpus:
        return _virtual_devices(per_worker or 1, framework)
    share = per_worker or len(gpus) // workers
    if share < 1 or share * workers > len(gpus):
        raise InputError(
            f"{workers} workers on this machine require {max(share, 1)} GPU(s) each. Received: "
            f"{len(gpus)} GPU(s). Start fewer workers, or set CUDA_VISIBLE_DEVICES to nothing to "
            "train on CPUs."
        )
    own = gpus[local_rank * share : (local_rank + 1) * share]
    environment = {"CUDA_VISIBLE_DEVICES": ",".join(own)}
    if framework == "jax":
        # Under Slurm and Open MPI JAX would take the one of those whose number is the task's.
        environment["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, range(share)))
    return environment


def _virtual_devices(count: int, framework: str) -> Mapping[str, str]:
    if count == 1:
        return {}
    environment = {"SYNCBN_DEVICES_PER_WORKER": str(count)}
    if framework == "jax":
        flag = f"--xla_force_host_platform_device_count={count}"
        environment["XLA_FLAGS"] = " ".join(filter(None, [os.environ.get("XLA_FLAGS"), flag]))
    return environment
