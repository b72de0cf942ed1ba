"""Runs the launcher with JAX and torch themselves, in an environment of their own (1 GB).

python tests/frameworks.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
# torch comes as its build for CPUs from the registry in use, or as the larger ordinary one.
PACKAGES = ("jax==0.10.2", "keras==3.15.1", "torch==2.13.0")

JAX = """
    import os
    os.environ["KERAS_BACKEND"] = "jax"
    import keras
    keras.distribution.initialize()
    import jax
    import jax.numpy as jnp
    from jax.experimental.multihost_utils import process_allgather
    rank = jax.process_index()
    total = process_allgather(jnp.asarray([rank + 1.0])).sum()
    print("sum", total, "of", jax.process_count(), "devices", jax.device_count())
"""
TORCH = """
    import torch
    import torch.distributed as dist
    dist.init_process_group("gloo")
    total = torch.tensor(dist.get_rank() + 1.0)
    dist.all_reduce(total)
    print("sum", total.item(), "of", dist.get_world_size(), "threads", torch.get_num_threads())
    dist.destroy_process_group()
"""
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# The program, the launcher's options, and what every worker must print.
RUNS = (
    (JAX, ("--backend", "jax"), "sum 3.0 of 2 devices 2"),
    (JAX, ("--backend", "jax", "--devices-per-worker", "2"), "sum 3.0 of 2 devices 4"),
    (TORCH, ("--backend", "torch"), f"sum 3.0 of 2 threads {max(1, CORES // 2)}"),
    (TORCH, ("--backend", "torch", "--no-isolate"), "sum 3.0 of 2 threads"),
)


def passes(python: Path, folder: Path, program: str, options: tuple[str, ...], wanted: str) -> bool:
    """Whether both workers print what they must."""
    file = folder / "program.py"
    file.write_text(textwrap.dedent(program))
    command = [str(python), "-m", "syncbn", "launch", "--workers", "2", *options, str(file)]
    result = subprocess.run(command, check=False, timeout=300, capture_output=True, text=True)
    found = all(f"[{worker}] {wanted}" in result.stdout for worker in (0, 1))
    if result.returncode or not found:
        print(result.stdout, result.stderr, sep="\n")
    return found and result.returncode == 0


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = folder / "environment" / "bin" / "python"
        pip = (str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        for command in (
            (sys.executable, "-m", "venv", str(folder / "environment")),
            (*pip, *PACKAGES, "editables", "hatchling"),
            (*pip, "--no-build-isolation", "--no-deps", "--editable", str(ROOT)),
        ):
            subprocess.run(command, cwd=folder, check=True, timeout=1800)
        outcomes = []
        for program, options, wanted in RUNS:
            outcomes.append(passes(python, folder, program, options, wanted))
            print("ok    " if outcomes[-1] else "FAILED", " ".join(options), flush=True)
    return 0 if all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
