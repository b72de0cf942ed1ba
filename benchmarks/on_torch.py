"""One layer on torch, forward and backward: ours against Keras's and torch's own kernel.

In one process, where nothing is synchronized; and by two over gloo on 127.0.0.1, chains of layers,
of which ours alone synchronizes. The variants take turns, step by step, on the same inputs.

    python benchmarks/on_torch.py --output benchmarks/results/on_torch.json
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

from machine import options, write
from processes import add_options, measured_by
from syncbn.bench.timing import interleaved, show

PROCESSES = 2
BASELINE = "keras"
NATIVE = "native"
# Inputs and the axis of the channels.
ALONE = (
    ((32, 64, 56, 56), 1),
    ((32, 56, 56, 64), -1),
    ((4096, 256), -1),
    ((32, 8, 8, 32), -1),
)
# Layers of a chain, the shape on each process; channels last.
CHAINS = ((20, (16, 8, 8, 32)), (3, (16, 56, 56, 64)))


def variants(axis: int, channels: int) -> dict[str, Callable[[], Callable[[Any], Any]]]:
    """Functions that make layers, by name; each call of one is a step of training."""
    import keras
    import torch

    import syncbn

    def of_keras(layer: Any) -> Callable[[Any], Any]:
        return lambda x: layer(x, training=True)

    def native() -> Callable[[Any], Any]:
        state = [torch.zeros(channels), torch.ones(channels)]
        affine = [torch.ones(channels).requires_grad_(), torch.zeros(channels).requires_grad_()]
        return lambda x: torch.nn.functional.batch_norm(
            x.movedim(axis, 1), *state, *affine, training=True
        ).movedim(1, axis)

    return {
        "syncbn": lambda: of_keras(syncbn.SyncBatchNormalization(axis=axis)),
        BASELINE: lambda: of_keras(keras.layers.BatchNormalization(axis=axis)),
        NATIVE: native,
    }


def steps_of(shape: tuple[int, ...], axis: int, layers: int = 1) -> dict[str, Callable[[], None]]:
    """Forward and backward of chains of such layers, relu between them."""
    import torch

    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator) for _ in range(2))

    def step_of(make: Callable[[], Callable[[Any], Any]]) -> Callable[[], None]:
        chain = [make() for _ in range(layers)]
        inputs = x.clone().requires_grad_()

        def step() -> None:
            inputs.grad = None
            outputs = inputs
            for number, layer in enumerate(chain):
                outputs = layer(outputs if number == 0 else torch.relu(outputs))
            outputs.backward(dy)

        return step

    return {name: step_of(make) for name, make in variants(axis, shape[axis]).items()}


def work(rounds: int, index: int, output: Path) -> None:
    """One process: the same rounds as the other, and the first keeps the figures."""
    import torch
    from torch import distributed

    torch.set_num_threads(max(1, (os.cpu_count() or PROCESSES) // PROCESSES))
    distributed.init_process_group(
        "gloo", init_method=f"file://{output}.store", rank=index, world_size=PROCESSES
    )
    results = [
        {
            "layers": layers,
            "shape_per_process": shape,
            "variants": interleaved(steps_of(shape, -1, layers), rounds, BASELINE),
        }
        for layers, shape in CHAINS
    ]
    if index == 0:
        output.write_text(json.dumps(results), encoding="utf-8")
    distributed.destroy_process_group()


def alone(rounds: int) -> list[dict[str, Any]]:
    """Figures of each shape in this process."""
    return [
        {
            "shape": shape,
            "axis": axis,
            "variants": interleaved(steps_of(shape, axis), rounds, BASELINE, NATIVE),
        }
        for shape, axis in ALONE
    ]


def main() -> int:
    """Measure, print tables, write the JSON."""
    parser = options(__doc__, rounds=30)
    add_options(parser)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.rounds, arguments.index, arguments.worker)
        return 0
    results = {
        "one_process": alone(arguments.rounds),
        "processes": measured_by(
            __file__, PROCESSES, ["--rounds", str(arguments.rounds)], arguments.timeout
        ),
    }
    for place, found in results.items():
        for one in found:
            kind = (
                f"{one.get('layers', 1)} × {list(one.get('shape', one.get('shape_per_process')))}"
            )
            print(f"{place}: {kind}")
            show(one["variants"], BASELINE)
    write(
        arguments.output,
        what="forward and backward on torch, float32",
        processes=PROCESSES,
        rounds=arguments.rounds,
        results=results,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
