"""`layer`: the layer in strategy.run, on replicas of unequal batches, one of them empty."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np

import syncbn
from syncbn.selftest.checks import Finding, Options
from syncbn.selftest.cluster import Cluster
from syncbn.selftest.reference import largest_gap, normalize

__all__ = ["run"]

CHANNELS = 5
EPSILON = 1e-3
MOMENTUM = 0.9
# By dtype: at means around 0 and at means of 1e3 standard deviations. What replicas sum in float64
# is M2 + n · mean², whose relative error there is 1e-16 times the square of 1e3.
BOUNDS = {"float64": (1e-11, 1e-9), "float32": (2e-6, 2e-6)}


class Batch(NamedTuple):
    """One array a replica."""

    inputs: list[Any]
    cotangents: list[Any]


def run(cluster: Cluster, options: Options) -> list[Finding]:  # noqa: ARG001 - as every check
    """The largest gaps to NumPy by dtype, and how many workers keep other moving statistics."""
    findings = []
    uneven = [4 + 5 * (replica % 3) for replica in range(cluster.replicas)]
    # With one replica there is no other that could have data.
    empty = [*uneven[:-1], 0] if cluster.replicas > 1 else uneven
    for dtype, (bound, bound_at_large_means) in BOUNDS.items():
        central = [
            _compare(cluster, _batch(counts, 0.0, dtype), dtype) for counts in (uneven, empty)
        ]
        far = _compare(cluster, _batch(uneven, 1e3, dtype), dtype)
        gap = float(np.max([gap for gap, _ in central]))
        findings.append(Finding(f"{dtype}: gap to NumPy", gap, bound))
        findings.append(Finding(f"{dtype}, mean 1e3: gap", far[0], bound_at_large_means))
        states = [state for _, state in (*central, far)]
        everyones = cluster.exchange(f"moving statistics in {dtype}", states)
        others = sum(theirs != everyones[0] for theirs in everyones)
        # Bit by bit: where they differ, workers drift apart.
        findings.append(Finding(f"{dtype}: workers with other moving statistics", others, 0))
    return findings


def _batch(counts: list[int], offset: float, dtype: str) -> Batch:
    rng = np.random.default_rng([sum(counts), 2024])
    # Replicas differ in location and scale, so that their own statistics are far from the whole's.
    inputs = [
        (offset + rng.normal(0.7 * (r % 2), 1.0 + 0.5 * (r % 2), (n, CHANNELS))).astype(dtype)
        for r, n in enumerate(counts)
    ]
    return Batch(inputs, [rng.normal(size=(n, CHANNELS)).astype(dtype) for n in counts])


def _compare(cluster: Cluster, batch: Batch, dtype: str) -> tuple[float, str]:
    """This worker's largest gap, and the hash of its moving statistics."""
    rng = np.random.default_rng(7)
    gamma = rng.uniform(0.5, 1.5, CHANNELS).astype("float32")
    beta = rng.normal(size=CHANNELS).astype("float32")
    expected = normalize(
        np.concatenate(batch.inputs), np.concatenate(batch.cotangents), gamma, beta, EPSILON
    )
    layer = _new_layer(cluster, dtype, gamma, beta)
    y, dx, of_gamma, of_beta = _step(cluster, layer, batch)
    ends = np.cumsum([len(part) for part in batch.inputs])[:-1]
    rows = [np.split(array, ends) for array in (expected.outputs, expected.input_gradient)]
    own = [np.concatenate([parts[r] for r in cluster.own_replicas]) for parts in rows]
    # Relative to the largest of all replicas, of which this worker holds a part.
    scales = [np.abs(array).max() for array in (expected.outputs, expected.input_gradient)]
    gaps = [
        _gap(observed, wanted, scale)
        for observed, wanted, scale in zip((y, dx), own, scales, strict=True)
    ]
    gaps += [
        largest_gap(of_gamma, expected.gamma_gradient),
        largest_gap(of_beta, expected.beta_gradient),
    ]
    moving = [layer.moving_mean.numpy(), layer.moving_variance.numpy()]
    gaps += [
        largest_gap(moving[0], expected.mean * (1 - MOMENTUM)),
        largest_gap(moving[1], MOMENTUM + expected.variance * (1 - MOMENTUM)),
    ]
    state = b"".join(np.ascontiguousarray(array).tobytes() for array in moving)
    return float(np.max(gaps)), hashlib.sha256(state).hexdigest()


def _gap(observed: Any, expected: Any, scale: float) -> float:
    if observed.shape != expected.shape:
        return float("inf")
    difference = np.abs(observed.astype(np.float64) - expected)
    return float(difference.max() / scale) if difference.size else 0.0


def _new_layer(cluster: Cluster, dtype: str, gamma: Any, beta: Any) -> Any:
    with cluster.strategy.scope():
        layer = syncbn.SyncBatchNormalization(momentum=MOMENTUM, epsilon=EPSILON, dtype=dtype)
        layer.build((None, CHANNELS))
        layer.gamma.assign(gamma)
        layer.beta.assign(beta)
    return layer


def _step(cluster: Cluster, layer: Any, batch: Batch) -> list[Any]:
    """Outputs and input gradients of this worker; gradients of gamma and beta of all."""
    import tensorflow as tf

    def replica(x: Any, cotangent: Any) -> Any:
        weights = [layer.gamma.value, layer.beta.value]
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        dx, *own = tape.gradient(y, [x, *weights], output_gradients=cotangent)
        context = tf.distribute.get_replica_context()
        summed = context.all_reduce(tf.distribute.ReduceOp.SUM, own)
        return y, dx, *summed

    strategy = cluster.strategy
    values = [
        strategy.experimental_distribute_values_from_function(
            lambda context, arrays=arrays: tf.constant(arrays[context.replica_id_in_sync_group])
        )
        for arrays in batch
    ]
    results = tf.function(lambda *args: strategy.run(replica, args), autograph=False)(*values)
    local = [strategy.experimental_local_results(result) for result in results]
    parts = [np.concatenate([part.numpy() for part in both]) for both in local[:2]]
    return [*parts, *(summed[0].numpy() for summed in local[2:])]
