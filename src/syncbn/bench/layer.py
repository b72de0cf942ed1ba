"""One layer, forward and backward, on replicas: the variants and the yardstick in turn."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from syncbn.bench.step import copy_elements, make_copy, make_step
from syncbn.bench.timing import summarize, take_turns

__all__ = ["COPY_PASSES", "FLOOR_PASSES", "measure_layer", "show_bandwidth"]

# Forward: the input is read twice, for the statistics and to normalize, and the output written.
# Backward: two tensors are read twice, for the sums and for the gradient, which is written.
FLOOR_PASSES = 8
COPY_PASSES = 3  # of `x + dy`
_COPY = "copy"


def measure_layer(
    strategy: Any,
    makers: Mapping[str, Callable[[], Any]],
    shape: tuple[int, ...],
    rounds: int,
    baselines: Sequence[str],
    stop: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Figures of each variant, and the samples that they come from.

    Args:
        strategy: over whose replicas.
        makers: of the layers, by name.
        shape: of the inputs on each replica; float32.
        rounds: in which they take turns.
        baselines: names to compare with.
        stop: called between steps; raises to end the measurement.

    Returns:
        "variants": by name, median milliseconds, speed relative to the baselines and
        "bandwidth_fraction", the share of the copy bandwidth at which `FLOOR_PASSES` passes over
        the tensor would take as long; "copy_gigabytes_per_second" of all replicas together;
        "seconds": the samples, by name.
    """
    steps: dict[str, Callable[[], None]] = {_COPY: make_copy(strategy)}
    for name, make in makers.items():
        stop()
        with strategy.scope():
            layer = make()
        steps[name] = make_step(strategy, layer, shape)
    seconds = take_turns(steps, rounds, stop)
    copying = seconds.pop(_COPY)
    figures = summarize(seconds, *baselines)
    floor = FLOOR_PASSES * math.prod(shape) / (COPY_PASSES * copy_elements(strategy))
    for name, figure in figures.items():
        fractions = [floor * copy / own for copy, own in zip(copying, seconds[name], strict=True)]
        figure["bandwidth_fraction"] = round(statistics.median(fractions), 4)
    copied = 4 * COPY_PASSES * copy_elements(strategy) * strategy.num_replicas_in_sync
    return {
        "variants": figures,
        "copy_gigabytes_per_second": round(copied / statistics.median(copying) / 1e9, 2),
        "seconds": seconds,
    }


def show_bandwidth(result: Mapping[str, Any]) -> str:
    """A line of what each variant reaches of the copy bandwidth."""
    shares = ", ".join(
        f"{name} {100 * figure['bandwidth_fraction']:.1f} %"
        for name, figure in result["variants"].items()
    )
    return (
        f"  {FLOOR_PASSES} passes at the copy bandwidth of "
        f"{result['copy_gigabytes_per_second']:.1f} GB/s: {shares}"
    )
