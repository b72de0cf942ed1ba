"""`fit`: Keras's fit over all workers, on arrays, the last batch of each epoch ragged."""

from __future__ import annotations

from syncbn.selftest.checks import Finding, Options
from syncbn.selftest.cluster import Cluster
from syncbn.selftest.training import compare, data

__all__ = ["run"]


def run(cluster: Cluster, options: Options) -> list[Finding]:  # noqa: ARG001 - as every check
    """The gaps of weights and losses to NumPy."""
    size = 8 * cluster.replicas
    count = 3 * size + 3 * cluster.replicas + 1
    x, y = data(count, seed=1)
    batches = [(x[i : i + size], y[i : i + size]) for i in range(0, count, size)]
    return compare(cluster, batches, x=x, y=y, batch_size=size)
