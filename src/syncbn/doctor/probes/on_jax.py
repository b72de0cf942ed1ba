"""JAX: its devices, and a step of each batch normalization on two of them."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from syncbn.doctor.probes.start import Case, Probe

CHANNELS = 4


def main(probe: Probe, arguments: list[str]) -> None:  # noqa: ARG001 - as every probe's
    """All of it."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=2".strip()
    # The doctor is a guest on the GPUs: it leaves their memory to whoever trains.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    probe.doing("import jax")
    import jax

    probe.found(version=["jax", jax.__version__])
    probe.doing("list devices")
    devices = jax.devices()
    platform = devices[0].platform
    replicas = devices[:2] if len(devices) > 1 else jax.devices("cpu")[:2]
    real = platform != "cpu" and len(devices) > 1
    probe.found(
        devices=["CPU"] if platform == "cpu" else [str(device) for device in devices],
        gpus=len(devices) if platform == "gpu" else 0,
        replicas=f"2 {platform.upper()}s" if real else "2 virtual CPU devices",
        collectives={"gpu": "NCCL", "cpu": "XLA's on the CPU"}.get(
            platform, f"XLA's on {platform}"
        ),
        xla="works",
    )
    probe.doing("import Keras")
    import keras

    backend = keras.backend.backend()
    probe.found(keras="keras", version=["keras", keras.__version__], backend=backend)
    _layers(probe, keras, jax.sharding.Mesh(replicas, ("batch",)))


def _layers(probe: Probe, keras: Any, mesh: Any) -> None:
    normal = keras.layers.BatchNormalization
    kinds: list[tuple[str, str, Callable[..., Any]]] = [
        ("plain", "BatchNormalization()", normal),
        ("native", "BatchNormalization(synchronized=True)", partial(normal, synchronized=True)),
    ]
    probe.doing("import syncbn")
    ours = probe.attempt("syncbn", _ours)
    if ours is not None:
        kinds.append(("ours", "syncbn.SyncBatchNormalization()", ours))
    for role, name, make in kinds:
        probe.doing(f"make {name}")
        if probe.attempt(name, make) is None:
            continue
        for context, step in (("shard_map", _in_shard_map), ("keras.distribution", _in_jit)):
            # What is global by the framework itself is no merit of the layer.
            probe.found(layer={"name": f"{name}, {context}", "role": role, "context": context})
            for case in probe.cases(equal_parts=True):
                probe.measure(f"{name}, {context}", case, partial(step, mesh, make))


def _ours() -> Any:
    import syncbn

    return syncbn.SyncBatchNormalization


def _prepared(make: Callable[..., Any]) -> Any:
    layer = make(momentum=0.5)
    layer.build((None, None, CHANNELS))
    return (
        layer,
        [v.value for v in layer.trainable_variables],
        [v.value for v in layer.non_trainable_variables],
    )


def _whole(case: Case) -> tuple[Any, Any]:
    """The parts as one batch, and its mask or None."""
    import numpy as np

    masks = None if case.masks is None else np.concatenate(case.masks)
    return np.concatenate(case.parts), masks


def _seen(outputs: Any, copies: Any) -> dict[str, Any]:
    import numpy as np

    copies = np.asarray(copies).tolist()
    # The first is what is kept where the result is declared the same everywhere.
    return {"outputs": np.split(np.asarray(outputs), 2), "copies": copies, "read": copies[0]}


def _moving_mean(layer: Any, values: Any) -> Any:
    names = [variable.path for variable in layer.non_trainable_variables]
    return values[names.index(layer.moving_mean.path)]


def _in_shard_map(mesh: Any, make: Callable[..., Any], case: Case) -> dict[str, Any]:
    import jax

    layer, trainable, others = _prepared(make)
    split, same = jax.sharding.PartitionSpec("batch"), jax.sharding.PartitionSpec()

    def step(trainable: Any, others: Any, inputs: Any, mask: Any = None) -> Any:
        outputs, moved = layer.stateless_call(trainable, others, inputs, training=True, mask=mask)
        return outputs, _moving_mean(layer, moved)[None]

    batch = [value for value in _whole(case) if value is not None]
    specs = (same, same, *(split for _ in batch))
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=specs, out_specs=(split, split), check_vma=False
    )
    return _seen(*jax.jit(mapped)(trainable, others, *batch))


def _in_jit(mesh: Any, make: Callable[..., Any], case: Case) -> dict[str, Any]:
    import jax
    import keras

    previous = keras.distribution.distribution()
    devices = [f"{device.platform}:{device.id}" for device in mesh.devices.flat]
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    try:
        layer, trainable, others = _prepared(make)
        split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
        inputs, mask = _whole(case)
        inputs = jax.device_put(inputs, split)
        mask = None if mask is None else jax.device_put(mask, split)

        step = jax.jit(partial(layer.stateless_call, training=True))
        outputs, moved = step(trainable, others, inputs, mask=mask)
        value = _moving_mean(layer, moved)
        return _seen(outputs, [shard.data for shard in value.addressable_shards])
    finally:
        keras.distribution.set_distribution(previous)
