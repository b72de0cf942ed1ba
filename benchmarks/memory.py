"""Peak memory of a forward and a backward of twelve layers: ours, Keras's, the fused kernel.

Two stacks of [16, 56, 56, 64]: twelve normalizations with relu between, and twelve blocks of a
convolution, a normalization and leaky_relu. Every variant runs in fresh processes of its own, in
turn; a figure is the peak of a process above what it held before the step.

Two measures, which must tell the same story:

- resident: what the operating system had to give (VmHWM, reset before the step). TensorFlow keeps
  what it frees, and so does malloc, which would hide a second step's need: here TensorFlow takes
  its memory from malloc, and malloc gives every tensor back (a fixed MALLOC_MMAP_THRESHOLD_).
- allocator: TensorFlow's own count, with the allocator that users have. Its chunks may be up to
  twice as large as what is asked for, and it knows nothing of scratch memory.

    python benchmarks/memory.py --output benchmarks/results/memory.json
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from machine import options, write
from syncbn.bench.timing import Quartiles

SHAPE = (16, 56, 56, 64)
LAYERS = 12
TENSOR = 4 * math.prod(SHAPE)  # bytes
STEPS = 3  # in each process; the first, which traces, is not counted
BASELINE = "fused_local"
MEASURES: dict[str, dict[str, str]] = {
    "resident": {"TF_ONEDNN_USE_SYSTEM_ALLOCATOR": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    "allocator": {},
}
VARIANTS = ("syncbn", "syncbn_output", "keras_sync", "keras_local", "fused_local")
STACKS = ("relu_stack", "deep_stack")


def peak_resident(action: Callable[[], Any]) -> int:
    """Bytes that the process held at most while the action ran, above what it held before.

    Raises:
        RuntimeError: the system does not count, or does not reset, what a process held at most.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError as error:
        raise RuntimeError(
            "The peak of resident memory requires Linux, where writing 5 to /proc/self/clear_refs "
            f"resets it. Received: {error}. Measure on Linux."
        ) from error
    start = _held_at_most()
    action()
    return _held_at_most() - start


def _held_at_most() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(
        "The peak of resident memory requires VmHWM in /proc/self/status. Received: a file "
        "without it. Measure on Linux."
    )


def peak_of_allocator(action: Callable[[], Any]) -> int:
    """Bytes that TensorFlow's CPU allocator had lent at most, above what it had lent before.

    Raises:
        RuntimeError: this TensorFlow's CPU allocator does not count.
    """
    import tensorflow as tf

    device = tf.config.list_logical_devices("CPU")[0].name
    tf.config.experimental.reset_memory_stats(device)
    start = tf.config.experimental.get_memory_info(device)["current"]
    action()
    peak = int(tf.config.experimental.get_memory_info(device)["peak"])
    if peak == 0:
        raise RuntimeError(
            "The allocator's peak requires a TensorFlow whose CPU allocator counts, as that with "
            "oneDNN does. Received: a peak of 0 bytes. Take the resident measure."
        )
    return peak - int(start)


PEAKS = {"resident": peak_resident, "allocator": peak_of_allocator}


def blocks(variant: str) -> dict[str, Callable[[], Any]] | None:
    """For each stack, what makes its normalization with the activation behind it.

    None for a variant that this version of the layer does not know.
    """
    import keras

    import syncbn
    from layer import FusedLocal

    def followed(make: Callable[[], Any], activation: str) -> Callable[[], Any]:
        return lambda: keras.Sequential([make(), keras.layers.Activation(activation)])

    def both(make: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
        return {"relu_stack": followed(make, "relu"), "deep_stack": followed(make, "leaky_relu")}

    layer = syncbn.SyncBatchNormalization
    if variant == "syncbn":
        return {
            "relu_stack": followed(layer, "relu"),
            "deep_stack": lambda: layer(activation="leaky_relu"),
        }
    if variant == "syncbn_output":
        if "save" not in inspect.signature(layer.__init__).parameters:
            return None
        # relu has no inverse: there the layer keeps its output, and relu its own.
        return {
            "relu_stack": followed(lambda: layer(save="output"), "relu"),
            "deep_stack": lambda: layer(activation="leaky_relu", save="output"),
        }
    others: dict[str, Callable[[], Any]] = {
        "keras_sync": lambda: keras.layers.BatchNormalization(synchronized=True),
        "keras_local": keras.layers.BatchNormalization,
        "fused_local": FusedLocal,
    }
    return both(others[variant])


def make_step(stack: str, make: Callable[[], Any]) -> Callable[[], None]:
    """A compiled forward and backward of the stack on one device."""
    import keras
    import numpy as np
    import tensorflow as tf

    layers = []
    for _ in range(LAYERS):
        if stack == "deep_stack":
            layers.append(keras.layers.Conv2D(SHAPE[-1], 1, use_bias=False))
        layers.append(make())
    for layer in layers:
        layer.build((None, *SHAPE[1:]))
    weights = [variable.value for layer in layers for variable in layer.trainable_variables]
    rng = np.random.default_rng(0)
    data = [tf.constant(rng.normal(size=SHAPE), tf.float32) for _ in range(2)]

    def step(x: Any, dy: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = x
            for layer in layers:
                y = layer(y, training=True)
        gradients = tape.gradient(y, [x, *weights], output_gradients=dy)
        # The whole result is made, and only a number of it leaves the function.
        return y[0, 0, 0, 0], gradients[0][0, 0, 0, 0], *gradients[1:]

    compiled = tf.function(step)

    def run() -> None:
        for number in compiled(*data):
            number.numpy()

    return run


def work(variant: str, measure: str) -> None:
    """Print the peaks of each stack as JSON, null for a variant that there is not."""
    makers = blocks(variant)
    peaks: dict[str, list[int]] | None = None
    if makers is not None:
        peaks = {}
        for stack, make in makers.items():
            step = make_step(stack, make)
            step()
            peaks[stack] = [PEAKS[measure](step) for _ in range(STEPS - 1)]
    print(json.dumps(peaks))


def in_a_process(variant: str, measure: str) -> dict[str, list[int]] | None:
    """What `work` prints in a fresh process."""
    command = [sys.executable, __file__, "--variant", variant, "--measure", measure]
    environment = {
        **os.environ,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "KERAS_BACKEND": "tensorflow",
        **MEASURES[measure],
    }
    result = subprocess.run(
        command, env=environment, check=False, timeout=300, stdout=subprocess.PIPE, text=True
    )
    if result.returncode != 0:
        raise RuntimeError(f"{variant} ended with {result.returncode}: its output is above")
    peaks: dict[str, list[int]] | None = json.loads(result.stdout.splitlines()[-1])
    return peaks


def figure(peaks: list[int], baseline: float) -> dict[str, float]:
    """Median and spread of the peaks of all processes, in megabytes and in tensors."""
    low, median, high = Quartiles.of(peaks)
    return {
        "megabytes_median": round(median / 1e6, 1),
        "lower_quartile": round(low / 1e6, 1),
        "upper_quartile": round(high / 1e6, 1),
        "tensors": round(median / TENSOR, 2),
        f"times_{BASELINE}": round(median / baseline, 3),
    }


def summary(
    peaks: Mapping[str, Mapping[str, list[int]]],
) -> dict[str, dict[str, dict[str, float]]]:
    """For each stack the figures of each variant, from its peaks by variant and stack."""
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for stack in STACKS:
        baseline = statistics.median(peaks[BASELINE][stack])
        figures[stack] = {name: figure(found[stack], baseline) for name, found in peaks.items()}
    return figures


def measure_all(rounds: int, measure: str) -> dict[str, dict[str, dict[str, float]]]:
    """Each variant in `rounds` processes, in turn."""
    peaks: dict[str, dict[str, list[int]]] = {}
    for turn in range(rounds):
        for variant in VARIANTS:
            found = in_a_process(variant, measure)
            if found is None:
                if turn == 0:
                    print(f"{variant}: skipped, this version of the layer has no such mode")
                continue
            for stack, values in found.items():
                peaks.setdefault(variant, {}).setdefault(stack, []).extend(values)
    return summary(peaks)


def show(figures: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Print a line for each stack and variant."""
    for stack, variants in figures.items():
        for name, found in variants.items():
            print(
                f"  {stack:10} {name:14} {found['megabytes_median']:7.1f} MB, "
                f"{found['tensors']:5.2f} tensors, "
                f"{found[f'times_{BASELINE}']:5.2f} times {BASELINE}"
            )


def main() -> int:
    """Measure, print a table, write the JSON."""
    parser = options(__doc__, rounds=2)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--measure", choices=tuple(MEASURES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        work(arguments.variant, arguments.measure)
        return 0
    results = {}
    for measure in MEASURES:
        # The allocator's count varies little: one process a variant is enough beside the other.
        results[measure] = measure_all(arguments.rounds if measure == "resident" else 1, measure)
        print(f"peak above the start, {measure}, {LAYERS} layers of {list(SHAPE)}")
        show(results[measure])
    write(
        arguments.output,
        what="peak memory above the start, forward and backward of twelve layers, float32",
        shape=SHAPE,
        layers=LAYERS,
        bytes_a_tensor=TENSOR,
        rounds=arguments.rounds,
        results=results,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
