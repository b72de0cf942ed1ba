"""`uneven`: every worker brings data of its own, each one global batch more than the one before."""

from __future__ import annotations

import numpy as np

from syncbn.selftest.checks import Finding, Options
from syncbn.selftest.cluster import Cluster
from syncbn.selftest.training import compare, data

__all__ = ["run"]


def run(cluster: Cluster, options: Options) -> list[Finding]:  # noqa: ARG001 - as every check
    """The gaps of weights and losses to NumPy."""
    import tensorflow as tf

    size = 4 * cluster.replicas  # of the global batch
    share = size // cluster.workers
    every = [data((1 + worker) * size, seed=20 + worker) for worker in range(cluster.workers)]
    # Under OFF a worker trains on its share of a batch at a time, until none has any data.
    batches = []
    for start in range(0, cluster.workers * size, share):
        parts = [[array[start : start + share] for array in own] for own in every]
        x, y = (np.concatenate(both) for both in zip(*parts, strict=True))
        batches.append((x, y))
    dataset = tf.data.Dataset.from_tensor_slices(every[cluster.worker]).batch(size)
    options_ = tf.data.Options()
    policy = tf.data.experimental.AutoShardPolicy.OFF
    options_.experimental_distribute.auto_shard_policy = policy
    return compare(cluster, batches, x=dataset.with_options(options_))
