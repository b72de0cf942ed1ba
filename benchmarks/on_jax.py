"""Chains of layers on JAX in a training step: ours against Keras's, which is global there too.

Under keras.distribution.DataParallel by two processes over gloo on 127.0.0.1, where collectives
count, and on one device, where they do not. The variants take turns, step by step.

    python benchmarks/on_jax.py --output benchmarks/results/on_jax.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

from machine import options, write
from processes import add_options, free_ports, measured_by
from syncbn.bench.timing import interleaved, show

PROCESSES = 2
BASELINE = "keras"
# Layers of a chain, the shape on each process.
CHAINS = ((20, (16, 8, 8, 32)), (20, (16, 4, 4, 256)), (3, (16, 56, 56, 64)))
ALONE = ((3, (32, 56, 56, 64)), (3, (32, 14, 14, 256)))


def variants() -> dict[str, Callable[[], Any]]:
    """The layers, by name."""
    import keras

    import syncbn

    return {"syncbn": syncbn.SyncBatchNormalization, BASELINE: keras.layers.BatchNormalization}


def make_step(make_layer: Callable[[], Any], layers: int, shape: tuple[int, ...]) -> Any:
    """A step of gradient descent of a model of nothing but such layers, relu between them."""
    import jax
    import keras
    import numpy as np

    stack = [keras.Input(shape[1:])]
    for _ in range(layers):
        stack += [make_layer(), keras.layers.ReLU()]
    model = keras.Sequential(stack)
    rng = np.random.default_rng(0)
    x, target = (_placed(rng.normal(size=shape).astype("float32")) for _ in range(2))

    def step(trainable: Any, rest: Any, x: Any, target: Any) -> Any:
        def loss(trainable: Any) -> Any:
            outputs, moved = model.stateless_call(trainable, rest, x, training=True)
            return ((outputs - target) ** 2).mean(), moved

        (value, moved), gradients = jax.value_and_grad(loss, has_aux=True)(trainable)
        return value, [w - 1e-3 * g for w, g in zip(trainable, gradients, strict=True)], moved

    compiled = jax.jit(step)
    state = [
        [variable.value for variable in variables]
        for variables in (model.trainable_variables, model.non_trainable_variables)
    ]

    def run() -> None:
        value, *state[:] = compiled(*state, x, target)
        jax.block_until_ready((value, state))

    return run


def _placed(array: Any) -> Any:
    """This process's part of a global array."""
    import jax
    import keras

    distribution = keras.distribution.distribution()
    if distribution is None:
        return jax.numpy.asarray(array)
    layout = distribution.get_data_layout(array.shape)
    return jax.make_array_from_process_local_data(layout.backend_layout, array)


def measure(chains: Any, rounds: int) -> list[dict[str, Any]]:
    """Figures of each chain in this process."""
    results = []
    for layers, shape in chains:
        steps = {name: make_step(make, layers, shape) for name, make in variants().items()}
        figures = interleaved(steps, rounds, BASELINE)
        results.append({"layers": layers, "shape_per_process": shape, "variants": figures})
    return results


def work(rounds: int, address: str, index: int, output: Path) -> None:
    """One process: the same rounds as the other, and the first keeps the figures."""
    import keras

    keras.distribution.initialize(address, PROCESSES, index)
    keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
    results = measure(CHAINS, rounds)
    if index == 0:
        output.write_text(json.dumps(results), encoding="utf-8")


def main() -> int:
    """Measure, print tables, write the JSON."""
    parser = options(__doc__, rounds=30)
    add_options(parser)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.rounds, arguments.address, arguments.index, arguments.worker)
        return 0
    common = ["--rounds", str(arguments.rounds), "--address", f"127.0.0.1:{free_ports(1)[0]}"]
    results = {
        "processes": measured_by(__file__, PROCESSES, common, arguments.timeout),
        "one_device": measure(ALONE, arguments.rounds),
    }
    for place, chains in results.items():
        for chain in chains:
            print(f"{place}: {chain['layers']} layers of {list(chain['shape_per_process'])}")
            show(chain["variants"], BASELINE)
    write(
        arguments.output,
        what="a training step of a chain of layers on JAX, float32",
        processes=PROCESSES,
        rounds=arguments.rounds,
        results=results,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
