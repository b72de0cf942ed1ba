"""What synchronizing costs on paper: latency + bytes / bandwidth of every collective, added up.

Pure arithmetic, no framework. Two uses:

- `fit` finds latency and bandwidth of measured collectives, and `ring` says what they make of more
  workers.
- `nccl_all_reduce` is the part of NCCL's own model (`ncclTopoTuneModel` and `ncclTopoGetAlgoTime`)
  that small payloads need: protocol LL, by ring or by tree, over nodes of eight GPUs. Of LL, LL128
  and Simple, LL has by far the smallest latency, and at the largest payload here (32 KiB) it still
  is the fastest by NCCL's tables.

Ignored, all of it to the disadvantage of whoever has more collectives: stragglers (a collective is
a barrier: it begins when the last replica is there), congestion by other jobs, what launching an
operation costs, and memory traffic. Ignored to the disadvantage of all: overlap with computing.

References:
    NVIDIA, NCCL, src/graph/tuning.cc, https://github.com/NVIDIA/nccl/blob/b6475625/src/graph/tuning.cc
    Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH",
    2005: the terms of ring and tree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from cost_constants import CONSTANTS, Constant

__all__ = [
    "GPUS_PER_NODE",
    "Interconnect",
    "Line",
    "Range",
    "contract_bytes",
    "fit",
    "interconnect",
    "keras_bytes",
    "nccl_all_reduce",
    "predict",
    "ring",
    "share",
    "tree",
]

GPUS_PER_NODE = 8

# NCCL's treeCorrectionFactor of LL: share of the bandwidth that a tree reaches at 64 bytes, 128, …
_TREE_CORRECTION = (1.0, 1.0, 1.0, 1.0, 0.9, 0.8, 0.7, 0.7, 0.7, 0.7, 0.6, 0.5, 0.4, 0.4, 0.5, 0.6)


class Line(NamedTuple):
    """Seconds of one collective: `latency + seconds_per_byte · bytes`."""

    latency: float  # seconds
    seconds_per_byte: float

    def seconds(self, size: float) -> float:
        """Of a collective of so many bytes."""
        return self.latency + self.seconds_per_byte * size


class Range(NamedTuple):
    """A bound from below and one from above."""

    low: float
    high: float


def fit(sizes: Sequence[float], seconds: Sequence[float]) -> Line:
    """The line with the smallest relative errors: min Σ ((α + β·bytes − t) / t)².

    Relative, because the sizes span six decades: by absolute errors the largest alone would count,
    and the latency, which is what synchronizing pays for, would be lost in its noise.

    Args:
        sizes: Bytes, at least two different ones.
        seconds: Measured time of each, positive.

    Raises:
        ValueError: too few sizes, or times that are not positive.
    """
    if len(set(sizes)) < 2 or len(sizes) != len(seconds) or min(seconds) <= 0:
        raise ValueError(
            "A latency and a bandwidth require positive times of at least two different sizes. "
            f"Received: sizes={list(sizes)}, seconds={list(seconds)}. Measure more sizes."
        )
    scale = max(sizes)
    rows = [(1 / t, size / scale / t) for size, t in zip(sizes, seconds, strict=True)]
    aa = sum(a * a for a, _ in rows)
    ab = sum(a * b for a, b in rows)
    bb = sum(b * b for _, b in rows)
    a1, b1 = sum(a for a, _ in rows), sum(b for _, b in rows)
    determinant = aa * bb - ab * ab
    latency = (bb * a1 - ab * b1) / determinant
    slope = (aa * b1 - ab * a1) / determinant
    return Line(latency, slope / scale)


def ring(replicas: int, size: float, latency: float, bandwidth: float) -> float:
    """Seconds of a ring all-reduce: 2(R−1)·latency + 2(R−1)/R · bytes / bandwidth.

    Args:
        replicas: R.
        size: Bytes that each replica hands over.
        latency: Seconds of one of its 2(R−1) steps.
        bandwidth: Bytes a second of a link.
    """
    steps = 2 * (replicas - 1)
    return steps * latency + steps / replicas * size / bandwidth


def tree(replicas: int, size: float, latency: float, bandwidth: float) -> float:
    """Seconds of a pipelined tree: 2·⌈log2 R⌉·latency + 2·bytes / bandwidth; nothing for R = 1."""
    if replicas == 1:
        return 0.0
    return 2 * math.ceil(math.log2(replicas)) * latency + 2 * size / bandwidth


class Interconnect(NamedTuple):
    """What NCCL's model needs of protocol LL: microseconds, and GB/s on 1, 2 and more nodes."""

    base_tree: float
    base_ring: float
    nvlink: float  # of a step within a node
    net_tree: float  # of a step between nodes
    net_ring: float
    net_overhead: float  # of posting to the network, least time of any step of a ring over nodes
    bandwidth_one_node: float
    bandwidth_two_nodes: float
    bandwidth_more_nodes: float
    measured_over_model: float  # published measurements against this model


def interconnect(bound: str, constants: Sequence[Constant] = CONSTANTS) -> Interconnect:
    """All constants at their `low` or all at their `high` cost."""
    values = {c.name: getattr(c, bound) for c in constants}
    return Interconnect(**{name: values[name] for name in Interconnect._fields})


def nccl_all_reduce(ranks: int, size: float, link: Interconnect) -> float:
    """Seconds of NCCL's all-reduce with protocol LL, by the faster of ring and tree.

    Within a node a tree is a chain, so its latency grows by the node's GPUs and by the logarithm
    of the nodes; a ring's grows by all GPUs.

    Args:
        ranks: GPUs: up to 8 in one node, or full nodes of 8.
        size: Bytes of each.
        link: Latencies and bandwidths.

    Raises:
        ValueError: nodes that are not full.
    """
    if ranks < 1 or (ranks > GPUS_PER_NODE and ranks % GPUS_PER_NODE):
        raise ValueError(
            f"The model requires 1 to {GPUS_PER_NODE} GPUs, or full nodes of {GPUS_PER_NODE}. "
            f"Received: {ranks}. Take a multiple of {GPUS_PER_NODE}."
        )
    if ranks == 1:
        return 0.0
    nodes = max(1, ranks // GPUS_PER_NODE)
    microseconds = min(
        _tree_latency(ranks, nodes, link) + size / (1e3 * _tree_bandwidth(nodes, size, link)),
        _ring_latency(ranks, nodes, link)
        + size / (1e3 * _bandwidth(nodes, link) * ranks / (2 * (ranks - 1))),
    )
    return 1e-6 * microseconds * link.measured_over_model


def _bandwidth(nodes: int, link: Interconnect) -> float:
    by_nodes = (link.bandwidth_one_node, link.bandwidth_two_nodes, link.bandwidth_more_nodes)
    return by_nodes[min(nodes, 3) - 1]


def _tree_bandwidth(nodes: int, size: float, link: Interconnect) -> float:
    """Half of the link's, as everything goes up and down; NCCL's 0.85 of a tree between nodes."""
    step = min(int(math.log2(max(1, int(size) >> 6))), len(_TREE_CORRECTION) - 1)
    return _bandwidth(nodes, link) * 0.85 * 0.5 * _TREE_CORRECTION[step]


def _tree_latency(ranks: int, nodes: int, link: Interconnect) -> float:
    within, between = ranks // nodes - 1, int(math.log2(nodes))
    return link.base_tree + 2 * (within * link.nvlink + between * link.net_tree)


def _ring_latency(ranks: int, nodes: int, link: Interconnect) -> float:
    between = 2 * nodes if nodes > 1 else 0
    within = 2 * (ranks - 1) - between
    step = max(link.nvlink, link.net_overhead) if nodes > 1 else link.nvlink
    return link.base_ring + within * step + between * link.net_ring


def contract_bytes(channels: int) -> tuple[int, int]:
    """Of our collectives of one layer: forward 2C+1 float64, backward 2C float32."""
    return (2 * channels + 1) * 8, 2 * channels * 4


def keras_bytes(channels: int) -> tuple[int, ...]:
    """Of Keras's five: sum, sum of squares and count, and two in the backward, all C float32."""
    return (channels * 4,) * 5


def predict(layers: Iterable[int], ranks: int, bytes_of: Callable[[int], Sequence[int]]) -> Range:
    """Seconds that the collectives of a step take, one after the other.

    One after the other is what happens: a layer's forward needs the layer before it, and
    TensorFlow orders the collectives of one replica by a token (`CollectiveReplicaLauncher`),
    so that also the independent ones of Keras's layer do not run side by side.

    Args:
        layers: Channels of each batch normalization.
        ranks: GPUs.
        bytes_of: Sizes of a layer's collectives by its channels.
    """
    sizes = [size for channels in layers for size in bytes_of(channels)]
    bounds = (interconnect(bound) for bound in ("low", "high"))
    return Range(*(sum(nccl_all_reduce(ranks, size, link) for size in sizes) for link in bounds))


def share(synchronizing: float, computing: float) -> float:
    """Of a step that synchronizing takes, 0 to 1."""
    return synchronizing / (synchronizing + computing)
