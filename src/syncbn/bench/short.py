"""The short benchmark on the user's own devices: layers, a step of training, and a verdict."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from syncbn.bench import machine
from syncbn.bench.layer import measure_layer
from syncbn.bench.settings import BenchSettings
from syncbn.bench.timing import summarize
from syncbn.bench.training import measure_training
from syncbn.bench.variants import FUSED_LOCAL, KERAS_LOCAL, KERAS_SYNC, OURS, variants
from syncbn.bench.verdict import Spread, Verdict, judge

__all__ = ["AGAIN", "ShortBenchmark", "verdict_of"]

# The same step a second time: what two equal ones differ by is what cannot be told apart.
AGAIN = "fused_local_again"
BASELINES = (KERAS_SYNC, FUSED_LOCAL)


class ShortBenchmark:
    """Measures piece by piece, so that each can be shown when it is there.

    Args:
        settings: checked.
        stop: called between steps; raises to end the measurement.
    """

    def __init__(self, settings: BenchSettings, stop: Callable[[], None]) -> None:
        self._settings = settings
        self._stop = stop
        self.replicas = settings.replicas or max(2, len(_gpus()))
        self._strategy = _strategy(self.replicas)
        self.devices = _devices(self._strategy)

    @property
    def lone_gpu(self) -> bool:
        """Whether the GPU of this machine is left out, as one GPU has nothing to synchronize."""
        return len(_gpus()) == 1

    def layers(self) -> Iterator[dict[str, Any]]:
        """The figures of each shape."""
        makers = variants()
        for shape in self._settings.shapes:
            rounds = self._settings.rounds
            figures = measure_layer(self._strategy, makers, shape, rounds, BASELINES, self._stop)
            yield {"shape_per_replica": shape, **figures}

    def training(self) -> dict[str, Any]:
        """The figures of the training step."""
        makers = variants()
        makers[AGAIN] = makers[FUSED_LOCAL]
        settings = self._settings
        seconds = measure_training(
            self._strategy, makers, settings.batch, settings.image, settings.rounds, self._stop
        )
        return {
            "batch_per_replica": settings.batch,
            "image": settings.image,
            "variants": summarize(seconds, *BASELINES),
            "seconds": seconds,
        }

    def write(self, layers: list[dict[str, Any]], training: dict[str, Any]) -> None:
        """Everything as JSON, with the verdict that follows from it."""
        verdict = verdict_of(training)
        machine.write(
            self._settings.output,
            what="forward and backward of one layer, and a step of training a small "
            "convolutional network, float32",
            devices=self.devices,
            replicas=self.replicas,
            rounds=self._settings.rounds,
            layers=layers,
            training=training,
            verdict={
                "outcome": verdict.outcome.value,
                "worth_up_to_examples_per_device": verdict.worth_up_to,
                "remarks": verdict.remarks,
                "sentence": verdict.sentence,
            },
        )


def verdict_of(training: dict[str, Any]) -> Verdict:
    """What the samples of the training step come to."""
    seconds = training["seconds"]

    def spread(numerator: str, denominator: str) -> Spread:
        pairs = zip(seconds[numerator], seconds[denominator], strict=True)
        return Spread.of([one / other for one, other in pairs])

    return judge(
        own_over_local=spread(OURS, FUSED_LOCAL),
        equal_steps=spread(AGAIN, FUSED_LOCAL),
        keras_over_own=spread(KERAS_SYNC, OURS),
        keras_local_over_own=spread(KERAS_LOCAL, OURS),
        batch=training["batch_per_replica"],
    )


@functools.cache
def _gpus() -> list[Any]:
    import tensorflow as tf

    return list(tf.config.list_physical_devices("GPU"))


def _strategy(replicas: int) -> Any:
    import tensorflow as tf

    from syncbn._backends.tensorflow.replicas import mirrored_strategy

    # Each variant is traced from the same place: TensorFlow takes that for a mistake and says so.
    tf.get_logger().setLevel("ERROR")
    return mirrored_strategy(replicas)


def _devices(strategy: Any) -> list[str]:
    """What the replicas run on, in words."""
    import tensorflow as tf

    names = []
    for device in strategy.extended.worker_devices:
        spec = tf.DeviceSpec.from_string(device)
        if spec.device_type == "GPU":
            details = tf.config.experimental.get_device_details(_gpus()[spec.device_index])
            names.append(f"GPU {spec.device_index}: {details.get('device_name', 'unknown')}")
        else:
            names.append(f"virtual CPU device {spec.device_index}")
    return names
