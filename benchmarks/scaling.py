"""How the cost of synchronizing grows with replicas, channels and workers: measured and on paper.

Four things, each of them small:

- steps of a layer on 1, 2, 4 and 8 virtual replicas, each replica with the same work, ours, Keras's
  and local ones in turn in one process (a process for each number of replicas: TensorFlow's devices
  are fixed once it has started);
- what a replica hands to collectives, read from the graph of the step, for several channel counts,
  and held against the contract: the script fails where they differ;
- bare collectives of 2 workers over loopback by size, the line of latency and bandwidth through
  them, and how well it predicts collectives of a model, and those of 4 workers;
- what the collectives of a ResNet-50 would take on 8 to 4096 GPUs, by NCCL's own model.

    python benchmarks/scaling.py --output benchmarks/results/scaling.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["KERAS_BACKEND"] = "tensorflow"

import cost_model
import scaling_workers
from cost_constants import CONSTANTS, IMAGES_PER_SECOND, REPLICA_BATCHES
from machine import options, write
from scaling_rounds import quartiles
from syncbn.bench.timing import take_turns

REPLICAS = (1, 2, 4, 8)
CHANNELS = (16, 64, 256, 1024, 2048)
SHAPES = ((8, 28, 28, 64), (64, 128))
LOCAL = ("keras_local", "fused_local")
# Steps of virtual replicas are short, and spread more: three of their rounds for one of workers.
VIRTUAL_ROUNDS = 3
RANKS = tuple(8 << shift for shift in range(10))  # 8 to 4096
MORE_WORKERS = 4
MORE_WORKERS_SIZES = (1 << 10, 1 << 12, 1 << 15, 1 << 20)
MORE_WORKERS_ROUNDS = 6  # more workers than cores: slow, and a check of the model alone


def time_shape(shape: tuple[int, ...], replicas: int, rounds: int) -> dict[str, Any]:
    """Steps of every variant on that many replicas, and what each costs over the local ones."""
    import tensorflow as tf

    from layer import VARIANTS, make_step
    from syncbn._backends.tensorflow.replicas import mirrored_strategy

    # A function for every variant and shape is meant, and no retracing by mistake.
    tf.get_logger().setLevel("ERROR")
    strategy = mirrored_strategy(replicas)
    steps = {name: make_step(strategy, make(), shape) for name, make in VARIANTS.items()}
    seconds = take_turns(steps, rounds)
    return {
        name: {
            "milliseconds_median": round(1e3 * quartiles(own)["median"], 3),
            "examples_per_second": round(replicas * shape[0] / quartiles(own)["median"]),
            **{
                f"times_the_time_of_{local}": {
                    which: round(value, 3)
                    for which, value in quartiles(
                        [t / base for t, base in zip(own, seconds[local], strict=True)]
                    ).items()
                }
                for local in LOCAL
            },
        }
        for name, own in seconds.items()
    }


def read_graphs(replicas: int) -> list[dict[str, Any]]:
    """What one replica hands to collectives, ours held against the contract."""
    import keras

    import syncbn
    from payload import Collective, Payload, contract, payload, require
    from syncbn._backends.tensorflow.replicas import mirrored_strategy

    strategy = mirrored_strategy(replicas)
    rows = []
    for channels in CHANNELS:
        ours = payload(strategy, syncbn.SyncBatchNormalization(), channels)
        where = f"{channels} channels on {replicas} replicas"
        require(ours, contract(channels, replicas), where)
        keras_layer = keras.layers.BatchNormalization(synchronized=True)
        theirs = payload(strategy, keras_layer, channels)
        each = Collective("float32", channels)
        expected = Payload((each,) * 3, (each,) * 2) if replicas > 1 else Payload((), ())
        # The prediction for thousands of replicas rests on it.
        require(theirs, expected, f"Keras's layer, {where}")
        for variant, found in (("syncbn", ours), ("keras_sync", theirs)):
            rows.append({"channels": channels, "variant": variant, **found.describe()})
    return rows


def in_a_process(replicas: int, rounds: int) -> dict[str, Any]:
    """What one number of replicas gives, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part.json"
        command = [sys.executable, __file__, "--rounds", str(rounds)]
        command += ["--replicas", str(replicas), "--part", str(part)]
        subprocess.run(command, check=True, timeout=300)
        result: dict[str, Any] = json.loads(part.read_text(encoding="utf-8"))
    return result


def one_part(replicas: int, rounds: int) -> dict[str, Any]:
    """Within such a process."""
    shapes = [
        {
            "shape_per_replica": shape,
            "variants": time_shape(shape, replicas, VIRTUAL_ROUNDS * rounds),
        }
        for shape in SHAPES
    ]
    return {"replicas": replicas, "shapes": shapes, "payload": read_graphs(replicas)}


def between_workers(rounds: int) -> dict[str, Any]:
    """2 workers, the line through their collectives, and what it says of 4."""
    sizes = scaling_workers.SIZES
    two = scaling_workers.summarize(scaling_workers.measure(2, sizes, rounds, 120), sizes)
    # 2 workers are a ring of two steps, each of half of the bytes.
    step, link = 0.5e-3 * two["latency_milliseconds"], 1e9 * two["gigabytes_per_second"]
    times = [cost_model.ring(MORE_WORKERS, size, step, link) for size in (0, 1 << 20)]
    line = cost_model.Line(times[0], (times[1] - times[0]) / (1 << 20))
    seconds = scaling_workers.measure(
        MORE_WORKERS, MORE_WORKERS_SIZES, min(rounds, MORE_WORKERS_ROUNDS), 120
    )
    more = scaling_workers.summarize(seconds, MORE_WORKERS_SIZES, line)
    return {"two": two, "more": {"workers": MORE_WORKERS, **more}}


def normalized_channels() -> list[int]:
    """Channels of every batch normalization of keras.applications.ResNet50."""
    import keras

    model = keras.applications.ResNet50(weights=None)
    return [
        int(layer.gamma.shape[0])
        for layer in model.layers
        if isinstance(layer, keras.layers.BatchNormalization)
    ]


def on_paper(layers: list[int]) -> dict[str, Any]:
    """Milliseconds of a step's collectives, and their share of the step, for every rank count."""
    batches = [int(constant.low) for constant in REPLICA_BATCHES]
    rows = []
    for ranks in RANKS:
        for variant, bytes_of in scaling_workers.LAYER_CHAINS.items():
            bounds = cost_model.predict(layers, ranks, bytes_of)
            shares = {
                str(batch): [
                    round(cost_model.share(t, batch / IMAGES_PER_SECOND.low), 5) for t in bounds
                ]
                for batch in batches
            }
            rows.append(
                {
                    "ranks": ranks,
                    "variant": variant,
                    "collectives": len(layers) * len(bytes_of(1)),
                    "milliseconds": [round(1e3 * t, 3) for t in bounds],
                    "share_by_images_a_replica": shares,
                }
            )
    constants = [c._asdict() for c in (*CONSTANTS, IMAGES_PER_SECOND, *REPLICA_BATCHES)]
    return {"layers": layers, "images_a_replica": batches, "rows": rows, "constants": constants}


def show(document: dict[str, Any]) -> None:
    """Print the short of it."""
    for part in document["replicas"]:
        for entry in part["shapes"]:
            cells = [
                f"{name} {figure['milliseconds_median']:.1f} ms "
                f"({figure['times_the_time_of_fused_local']['median']:.2f})"
                for name, figure in entry["variants"].items()
            ]
            print(f"{entry['shape_per_replica']} × {part['replicas']}: {', '.join(cells)}")
    for which, found in document["workers"].items():
        for chain in found["chains"]:
            print(
                f"workers, {which}: {chain['variant']} {chain['milliseconds']['median']:.1f} ms, "
                f"predicted {chain['predicted_milliseconds']:.1f}"
            )
    for row in document["paper"]["rows"]:
        low, high = row["milliseconds"]
        print(f"{row['ranks']:5} GPUs, {row['variant']:10}: {low:6.2f} to {high:6.2f} ms a step")


def main() -> int:
    """Everything, printed and written."""
    parser = options(__doc__, rounds=15)
    parser.add_argument("--replicas", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        part = one_part(arguments.replicas, arguments.rounds)
        arguments.part.write_text(json.dumps(part), encoding="utf-8")
        return 0
    document = {
        "rounds": {"workers": arguments.rounds, "replicas": VIRTUAL_ROUNDS * arguments.rounds},
        "replicas": [in_a_process(replicas, arguments.rounds) for replicas in REPLICAS],
        "workers": between_workers(arguments.rounds),
        "paper": on_paper(normalized_channels()),
    }
    show(document)
    what = "replicas at fixed work each, collectives' payload, and a model of their cost; float32"
    write(arguments.output, what=what, **document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
