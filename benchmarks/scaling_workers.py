"""Bare collectives between worker processes on 127.0.0.1: the measurements of the cost model.

Each worker runs the same compiled functions in the same order, and the first keeps the seconds. A
function has CHAIN collectives, each of which needs the one before, and the time of a function with
none is taken off: what is left is the collectives' alone.

    python benchmarks/scaling_workers.py --rounds 20
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cost_model
from machine import options
from processes import add_options, measured_by, tf_config
from scaling_rounds import quartiles
from syncbn.bench.timing import take_turns

__all__ = ["CHAIN", "FITTED", "LAYER_CHAINS", "SIZES", "measure", "summarize"]

CHAIN = 4
# Bytes, from one float64 to 16 MiB: what a layer hands over lies between 200 bytes and 32 KiB.
SIZES = tuple(8 << shift for shift in (0, 4, 6, 7, 9, 10, 11, 12, 14, 16, 17, 19, 21))
# The sizes that the line is laid through, chosen by how TensorFlow's ring works (ring_alg.cc) and
# not by how they fit: it sends nothing for an empty chunk, which is what makes the smallest ones
# cheaper, and has a second ring where a chunk would exceed 4 MiB, which is past 8 MiB with 2
# workers. Layers hand over from 264 bytes (16 channels) to 32 KiB. The rest is measured and shown.
FITTED = range(256, (8 << 20) + 1)
# Seconds after which a worker that nobody ended goes by itself.
_GOODBYE = 30

NOTHING = "nothing"
# The other measurement of the same run, that the fit has to predict.
LAYERS = 20
CHANNELS = 256
LAYER_CHAINS: dict[str, Callable[[int], Sequence[int]]] = {
    "syncbn": cost_model.contract_bytes,
    "keras_sync": cost_model.keras_bytes,
}


def chain_of(strategy: Any, sizes: Sequence[int]) -> Callable[[], None]:
    """A compiled function of collectives of so many bytes, one after the other."""
    import tensorflow as tf

    start = tf.zeros([max(sizes, default=8) // 8], tf.float64)

    def run(x: Any) -> Any:
        context = tf.distribute.get_replica_context()
        for size in sizes:
            # Zeros stay zeros, however often they are summed.
            x = context.all_reduce(tf.distribute.ReduceOp.SUM, x[: size // 8])
            if len(set(sizes)) > 1:
                x = x[0] + start
        return x[0]

    def on_all(x: Any) -> Any:
        return strategy.run(run, args=(x,))

    function = tf.function(on_all, autograph=False)

    def call() -> None:
        strategy.experimental_local_results(function(start))[0].numpy()

    return call


def work(rounds: int, sizes: Sequence[int], output: Path) -> None:
    """One worker: the same rounds as the others, and the first keeps the seconds."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    # A function for every size is meant, and no retracing by mistake.
    tf.get_logger().setLevel("ERROR")
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    steps = {NOTHING: chain_of(strategy, ())}
    steps |= {str(size): chain_of(strategy, [size] * CHAIN) for size in sizes}
    for name, bytes_of in LAYER_CHAINS.items():
        steps[name] = chain_of(strategy, _layer_sizes(bytes_of))
    seconds = take_turns(steps, rounds)
    if json.loads(os.environ["TF_CONFIG"])["task"]["index"] > 0:
        # The chief may still be receiving from here: it ends first, and `measure` ends the others.
        time.sleep(_GOODBYE)
    else:
        output.write_text(json.dumps(seconds), encoding="utf-8")
    # TensorFlow's servers would wait for each other at the end.
    sys.stdout.flush()
    os._exit(0)


def measure(
    workers: int, sizes: Sequence[int], rounds: int, timeout: float
) -> dict[str, list[float]]:
    """Seconds of each function in each round; starts the workers and ends whatever is left."""
    arguments = ["--rounds", str(rounds), "--sizes", *map(str, sizes)]
    seconds: dict[str, list[float]] = measured_by(
        __file__, workers, arguments, timeout, tf_config(workers)
    )
    return seconds


def summarize(
    seconds: dict[str, list[float]], sizes: Sequence[int], line: cost_model.Line | None = None
) -> dict[str, Any]:
    """Times of a collective by its size, a line through them, and what the line predicts.

    Args:
        seconds: Of `measure`.
        sizes: Those that were measured.
        line: What to predict with; by default what these figures give themselves.
    """
    nothing = seconds[NOTHING]
    of_one = {
        size: quartiles(
            [(t - empty) / CHAIN for t, empty in zip(seconds[str(size)], nothing, strict=True)]
        )
        for size in sizes
    }
    fitted = [size for size in sizes if size in FITTED]
    line = line or cost_model.fit(fitted, [of_one[size]["median"] for size in fitted])
    return {
        "collectives": [
            {
                "bytes": size,
                "fitted": size in FITTED,
                "milliseconds": _milliseconds(figure),
                "predicted_milliseconds": round(1e3 * line.seconds(size), 4),
                "predicted_over_measured": round(line.seconds(size) / figure["median"], 3),
            }
            for size, figure in of_one.items()
        ],
        "latency_milliseconds": round(1e3 * line.latency, 4),
        "gigabytes_per_second": round(1e-9 / line.seconds_per_byte, 4),
        "chains": [
            _chain(name, bytes_of, seconds[name], nothing, line)
            for name, bytes_of in LAYER_CHAINS.items()
        ],
    }


def _chain(
    name: str,
    bytes_of: Callable[[int], Sequence[int]],
    seconds: Sequence[float],
    nothing: Sequence[float],
    line: cost_model.Line,
) -> dict[str, Any]:
    """What a model's layers hand over, measured against what the line says of it."""
    sizes = _layer_sizes(bytes_of)
    measured = quartiles([t - empty for t, empty in zip(seconds, nothing, strict=True)])
    predicted = sum(line.seconds(size) for size in sizes)
    return {
        "variant": name,
        "layers": LAYERS,
        "channels": CHANNELS,
        "collectives": len(sizes),
        "milliseconds": _milliseconds(measured),
        "predicted_milliseconds": round(1e3 * predicted, 3),
        "relative_error": round(predicted / measured["median"] - 1, 3),
    }


def _layer_sizes(bytes_of: Callable[[int], Sequence[int]]) -> list[int]:
    """Bytes of the collectives of all layers, in turn."""
    return [size for _ in range(LAYERS) for size in bytes_of(CHANNELS)]


def _milliseconds(figure: dict[str, float]) -> dict[str, float]:
    return {name: round(1e3 * value, 4) for name, value in figure.items()}


def main() -> int:
    """Two workers, and the table."""
    parser = options(__doc__, rounds=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES), help="bytes")
    add_options(parser)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.rounds, arguments.sizes, arguments.worker)
    seconds = measure(arguments.workers, arguments.sizes, arguments.rounds, arguments.timeout)
    print(json.dumps(summarize(seconds, arguments.sizes), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
