"""TensorFlow: its devices, and a step of each batch normalization under MirroredStrategy."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from syncbn.doctor.probes.start import Case, Probe

CHANNELS = 4


def main(probe: Probe, arguments: list[str]) -> None:  # noqa: ARG001 - as every probe's
    """All of it."""
    probe.doing("import tensorflow")
    import tensorflow as tf

    probe.found(version=["tensorflow", tf.__version__])
    probe.doing("import Keras, by tf.keras")
    keras = tf.keras
    flavour = keras.layers.BatchNormalization.__module__.partition(".")[0]
    probe.found(
        keras=flavour,
        version=["tf.keras", getattr(keras, "__version__", tf.__version__)],
        backend="tensorflow",
    )
    probe.doing("list devices")
    devices = _devices(probe, tf)
    probe.doing("compile with XLA")
    _xla(probe, tf)
    probe.doing("make a MirroredStrategy")
    strategy = tf.distribute.MirroredStrategy(devices)
    _layers(probe, tf, keras, flavour, strategy)


def _devices(probe: Probe, tf: Any) -> list[str]:
    """Two for the replicas: GPUs where there are two, or virtual CPU devices."""
    config = getattr(tf.config, "list_physical_devices", None) or (
        tf.config.experimental.list_physical_devices
    )
    accelerators = [d for d in config() if d.device_type not in ("CPU", "XLA_CPU", "XLA_GPU")]
    gpus = [d for d in accelerators if d.device_type == "GPU"]
    for gpu in gpus:
        probe.attempt("memory growth", partial(_grow, tf, gpu))
    cpu = config("CPU")[0]
    if hasattr(tf.config, "set_logical_device_configuration"):
        make = tf.config.LogicalDeviceConfiguration
        tf.config.set_logical_device_configuration(cpu, [make(), make()])
    else:
        make = tf.config.experimental.VirtualDeviceConfiguration
        tf.config.experimental.set_virtual_device_configuration(cpu, [make(), make()])
    replicas = ["GPU:0", "GPU:1"] if len(gpus) > 1 else ["CPU:0", "CPU:1"]
    with_cuda = tf.test.is_built_with_cuda()
    probe.found(
        devices=[d.name for d in accelerators] or ["CPU"],
        gpus=len(gpus),
        built_for_gpus=with_cuda,
        replicas="2 GPUs" if len(gpus) > 1 else "2 virtual CPU devices",
        collectives="NCCL" if gpus and with_cuda else "RING",
    )
    return replicas


def _grow(tf: Any, gpu: Any) -> None:
    tf.config.experimental.set_memory_growth(gpu, True)


def _xla(probe: Probe, tf: Any) -> None:
    def attempt(**how: bool) -> None:
        tf.function(lambda x: x * 2 + 1, **how)(tf.ones(3))

    try:
        try:
            attempt(jit_compile=True)
        except TypeError:  # its name before 2.5
            attempt(experimental_compile=True)
    except Exception as error:  # noqa: BLE001 - whatever the compiler raises is it
        probe.found(xla=f"{type(error).__name__}: {str(error).splitlines()[0]}"[:300])
    else:
        probe.found(xla="works")


def _layers(probe: Probe, tf: Any, keras: Any, flavour: str, strategy: Any) -> None:
    """Each layer that this Keras has, and ours, on each case."""
    normal = keras.layers.BatchNormalization
    kinds: list[tuple[str, str, Callable[..., Any]]] = [
        ("plain", "BatchNormalization()", normal),
        ("native", "BatchNormalization(synchronized=True)", partial(normal, synchronized=True)),
    ]
    experimental = getattr(keras.layers, "experimental", None)
    old = getattr(experimental, "SyncBatchNormalization", None)
    if old is not None:
        kinds.append(("native", "experimental.SyncBatchNormalization()", old))
    else:
        probe.found(refused={"layer": "experimental.SyncBatchNormalization()", "because": "gone"})
    probe.doing("import syncbn")
    ours = probe.attempt("syncbn", lambda: _ours(flavour))
    if ours is not None:
        module = "syncbn.tf_keras" if flavour == "tf_keras" else "syncbn"
        kinds.append(("ours", f"{module}.SyncBatchNormalization()", ours))
    for role, name, make in kinds:
        probe.doing(f"make {name}")
        with strategy.scope():
            if probe.attempt(name, make) is None:
                continue
        probe.found(layer={"name": name, "role": role})
        for case in probe.cases():
            probe.measure(name, case, partial(_step, tf, strategy, make))


def _ours(flavour: str) -> Any:
    """The layer of syncbn for the Keras that is in use."""
    if flavour == "tf_keras":
        import syncbn.tf_keras

        return syncbn.tf_keras.SyncBatchNormalization
    # Asked first: of an older Keras the import would end with something else.
    if flavour != "keras" or not _is_keras_3():
        raise ImportError("syncbn requires Keras 3 or tf_keras, and TensorFlow 2.16 or later.")
    import syncbn

    return syncbn.SyncBatchNormalization


def _is_keras_3() -> bool:
    import keras

    return int(keras.__version__.split(".")[0]) >= 3


def _step(tf: Any, strategy: Any, make: Callable[..., Any], case: Case) -> dict[str, Any]:
    """A training step of a new layer on both replicas, each with its part."""
    with strategy.scope():
        layer = make(momentum=0.5)
        layer.build((None, None, CHANNELS))

    def replica() -> Any:
        number = tf.distribute.get_replica_context().replica_id_in_sync_group
        number = int(number) if isinstance(number, int) else int(_static(tf, number))
        part = tf.constant(case.parts[number])
        if case.masks is None:
            return layer(part, training=True)
        mask = tf.constant(case.masks[number])
        try:
            return layer(part, training=True, mask=mask)
        except TypeError:  # a layer that takes none; Keras hands it on beside the inputs
            part._keras_mask = mask
            return layer(part, training=True)

    run = getattr(strategy, "run", None) or strategy.experimental_run_v2
    outputs = tf.function(lambda: run(replica))()
    moving = getattr(layer.moving_mean, "value", None)
    # Keras 3 keeps TensorFlow's variable in its own; Keras 2's is one, with a method `value`.
    moving = layer.moving_mean if callable(moving) or moving is None else moving
    return {
        "outputs": [one.numpy() for one in strategy.experimental_local_results(outputs)],
        "copies": [one.numpy().tolist() for one in strategy.experimental_local_results(moving)],
        "read": layer.moving_mean.numpy().tolist(),
    }


def _static(tf: Any, number: Any) -> Any:
    if hasattr(tf, "get_static_value"):
        return tf.get_static_value(number)
    from tensorflow.python.framework import tensor_util

    return tensor_util.constant_value(number)
