"""The constants of the cost model, each with where it was read, or marked as assumed.

`low` and `high` are the ends of what synchronizing costs: a latency's low is its smallest value, a
bandwidth's low is its largest one.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["CONSTANTS", "IMAGES_PER_SECOND", "REPLICA_BATCHES", "Constant"]

_TUNING = "NCCL, src/graph/tuning.cc at b6475625 (2.20.3)"
_EXAMPLES = "NVIDIA DeepLearningExamples, PyTorch/Classification/ConvNets"


class Constant(NamedTuple):
    """A number of the model."""

    name: str
    low: float
    high: float
    unit: str
    source: str
    assumed: bool = False


CONSTANTS = (
    Constant("base_tree", 6.8, 6.8, "µs", f"{_TUNING}: baseLat, tree, LL"),
    Constant("base_ring", 6.6, 6.6, "µs", f"{_TUNING}: baseLat, ring, LL"),
    Constant("nvlink", 0.6, 0.6, "µs", f"{_TUNING}: hwLat, NVLINK, tree and ring, LL"),
    Constant("net_tree", 5.0, 5.0, "µs", f"{_TUNING}: hwLat, NET, tree, LL"),
    Constant("net_ring", 2.7, 2.7, "µs", f"{_TUNING}: hwLat, NET, ring, LL"),
    Constant("net_overhead", 1.0, 2.0, "µs", f"{_TUNING}: getNetOverhead, Intel to AMD"),
    Constant(
        "bandwidth_one_node", 87.7, 39.0, "GB/s", f"{_TUNING}: llMaxBws, Hopper to Volta, 1 node"
    ),
    Constant(
        "bandwidth_two_nodes", 39.0, 22.5, "GB/s", f"{_TUNING}: llMaxBws, Intel to AMD, 2 nodes"
    ),
    Constant(
        "bandwidth_more_nodes", 20.4, 19.0, "GB/s", f"{_TUNING}: llMaxBws, Intel to AMD, more nodes"
    ),
    # Published times of small all-reduces over what this model says of the same machines:
    # 0.97 (29.79 µs, 2 nodes of 8 GPUs on PCI, NVIDIA/nccl#757), 1.34 (93.12 µs, ring on two DGX
    # A100, nccl#812), 2.25 (33.7 µs, ring on one DGX A100, nccl-tests#123), 2.44 (61.58 µs where
    # NCCL itself expected 25.21, nodes of 8 H100, nccl#1453). The low end is NCCL's expectation.
    Constant(
        "measured_over_model",
        1.0,
        2.44,
        "times",
        "1: NCCL's model itself; 2.44: 61.58 µs measured where NCCL logged 25.21 "
        "(NVIDIA/nccl#1453), the worst of four published measurements (also nccl#757, nccl#812, "
        "nccl-tests#123)",
    ),
)

IMAGES_PER_SECOND = Constant(
    "images_per_second",
    2470,
    2470,
    "images/s",
    f"{_EXAMPLES}/resnet50v1.5/README.md at 291f0d02: one A100 80GB, mixed precision, "
    "256 images a GPU (configs.yml)",
)

# Images a replica. Both take the throughput above.
REPLICA_BATCHES = (
    Constant("replica_batch_large", 256, 256, "images", IMAGES_PER_SECOND.source),
    Constant(
        "replica_batch_small",
        32,
        32,
        "images",
        "taken to reach the throughput of 256 images, which it does not: the step is taken as "
        "shorter than it is, and the share of synchronizing as larger",
        assumed=True,
    ),
)
