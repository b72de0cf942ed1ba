"""flax's BatchNorm: of all devices by an axis name, or of one alone."""

from __future__ import annotations

import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

from collections.abc import Callable
from functools import partial
from typing import Any

import flax
import jax
import numpy as np
from flax import linen
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from serve import CORES, Made, arrays, serve

DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cpu"
AXIS = "replicas"


def forward_and_backward(module: Any, state: Any, parameters: Any, x: Any, dy: Any) -> Any:
    """Outputs, gradients and the moved statistics of the part of one device."""

    def forward(parameters: Any, x: Any) -> Any:
        return module.apply({"params": parameters, **state}, x, mutable=["batch_stats"])

    y, backward, moved = jax.vjp(forward, parameters, x, has_aux=True)
    gradients, dx = backward(dy)
    return y, dx, gradients["scale"], gradients["bias"], moved


def make(variant: str, shape: list[int], replicas: int) -> Made:
    """A compiled step: under shard_map with an axis name, or plain for `flax_local`."""
    devices = jax.devices(DEVICE)[:replicas]
    module = linen.BatchNorm(
        use_running_average=False,
        momentum=0.99,
        epsilon=1e-3,
        axis_name=AXIS if variant == "flax_sync" else None,
    )
    x, dy = arrays(shape, replicas)
    variables = linen.BatchNorm(use_running_average=False).init(jax.random.key(0), x[:1])
    state = {"batch_stats": variables["batch_stats"]}
    step: Callable[..., Any] = partial(forward_and_backward, module)
    mesh = Mesh(np.array(devices), (AXIS,))
    if variant == "flax_sync":
        split, same = PartitionSpec(AXIS), PartitionSpec()
        # Unchecked, as the gradients of scale and bias stay each device's own, stacked.
        step = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(same, same, split, split),
            out_specs=(split, split, split, split, same),
            check_vma=False,
        )
    place = NamedSharding(mesh, PartitionSpec(AXIS))
    everywhere = NamedSharding(mesh, PartitionSpec())
    compiled = jax.jit(step)
    arguments = (
        *jax.device_put((state, variables["params"]), everywhere),
        *jax.device_put((x, dy), place),
    )

    def run() -> Any:
        return jax.block_until_ready(compiled(*arguments))

    def results() -> list[np.ndarray]:
        y, dx, *gradients = run()[:4]
        summed = [np.asarray(g).reshape(replicas, -1).sum(0) for g in gradients]
        return [np.asarray(y), np.asarray(dx), *summed]

    return Made(run, results)


if __name__ == "__main__":
    # `jax.devices("gpu")` raises where there is none.
    accelerator = "gpu" if jax.default_backend() == "gpu" else None
    serve(
        make,
        versions={"jax": jax.__version__, "flax": flax.__version__},
        threads=CORES,
        accelerator=accelerator,
    )
