"""The cost model: its formulas by hand, its limits, its fit, and NCCL's own figures."""

import importlib
import itertools
import math
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("cost_model")


def test_ring_and_tree_by_hand(model):
    # 4 replicas, 1 µs a step, 1 GB/s: a ring has 6 steps and moves 6/4 of 1000 bytes.
    assert model.ring(4, 1000, 1e-6, 1e9) == pytest.approx(6e-6 + 1.5e-6)
    # A tree has 2·2 steps and moves everything up and down; 5 replicas need a level more.
    assert model.tree(4, 1000, 1e-6, 1e9) == pytest.approx(4e-6 + 2e-6)
    assert model.tree(5, 1000, 1e-6, 1e9) == pytest.approx(6e-6 + 2e-6)


def test_alone_costs_nothing(model):
    link = model.interconnect("high")
    assert model.ring(1, 1 << 20, 1e-3, 1e6) == 0
    assert model.tree(1, 1 << 20, 1e-3, 1e6) == 0
    assert model.nccl_all_reduce(1, 1 << 20, link) == 0


def test_cost_grows_with_replicas_and_with_bytes(model):
    ranks = [1, 2, 4, *(8 << shift for shift in range(10))]
    for bound in ("low", "high"):
        link = model.interconnect(bound)
        functions = [
            lambda r, n, link=link: model.nccl_all_reduce(r, n, link),
            lambda r, n: model.ring(r, n, 1e-6, 1e9),
            lambda r, n: model.tree(r, n, 1e-6, 1e9),
        ]
        for cost in functions:
            by_ranks = [cost(r, 4104) for r in ranks]
            assert all(a < b for a, b in itertools.pairwise(by_ranks))
            assert cost(64, 264) < cost(64, 4104) < cost(64, 32776)


def test_a_ring_of_many_moves_its_bytes_twice_and_its_latency_grows_by_the_replicas(model):
    assert model.ring(10**6, 1000, 0, 1e9) == pytest.approx(2 * 1000 / 1e9, rel=1e-5)
    assert model.ring(2001, 0, 1e-6, 1e9) == pytest.approx(2 * model.ring(1001, 0, 1e-6, 1e9))
    assert model.tree(2048, 0, 1e-6, 1e9) == pytest.approx(22e-6)


@pytest.mark.parametrize(
    ("size", "microseconds"), [(128, 25.214764), (32768, 30.599243), (65536, 37.798233)]
)
def test_the_model_is_nccls(model, size, microseconds):
    """What NCCL logged of itself on nodes of 8 H100, to the last digit: NVIDIA/nccl#1453.

    Two nodes are named in what could be read of the log; its bandwidth is that of more than two,
    its latency that of less than four.
    """
    found = 1e6 * model.nccl_all_reduce(24, size, model.interconnect("low"))
    assert found == pytest.approx(microseconds, abs=2e-6)


def test_latencies_by_hand(model):
    link = model.interconnect("low")
    # 8 GPUs: ring 6.6 + 14·0.6, tree 6.8 + 2·7·0.6. 64 nodes: tree 6.8 + 2·(7·0.6 + 6·5).
    assert 1e6 * model.nccl_all_reduce(8, 0, link) == pytest.approx(15.0)
    assert 1e6 * model.nccl_all_reduce(512, 0, link) == pytest.approx(75.2)


def test_the_high_bound_lies_above_the_low_one(model):
    for ranks in (2, 8, 16, 4096):
        low, high = model.predict([64, 2048], ranks, model.contract_bytes)
        assert 0 < low < high


def test_nodes_have_to_be_full(model):
    with pytest.raises(ValueError, match="Received: 12"):
        model.nccl_all_reduce(12, 8, model.interconnect("low"))


def test_a_prediction_is_the_sum_of_its_collectives(model):
    link = model.interconnect("low")
    sizes = [(2 * 64 + 1) * 8, 2 * 64 * 4, (2 * 256 + 1) * 8, 2 * 256 * 4]
    low, _ = model.predict([64, 256], 64, model.contract_bytes)
    assert low == pytest.approx(sum(model.nccl_all_reduce(64, size, link) for size in sizes))
    theirs, _ = model.predict([64, 256], 64, model.keras_bytes)
    assert theirs > 2 * low
    assert model.share(1.0, 3.0) == 0.25


def test_the_fit_finds_latency_and_bandwidth_in_noise(model):
    rng = np.random.default_rng(0)
    sizes = [8 << shift for shift in range(0, 22)]
    times = [(1.2e-3 + n / 5e8) * math.exp(rng.normal(scale=0.05)) for n in sizes]
    line = model.fit(sizes, times)
    assert line.latency == pytest.approx(1.2e-3, rel=0.05)
    assert line.seconds_per_byte == pytest.approx(1 / 5e8, rel=0.1)
    assert line.seconds(10**6) == pytest.approx(1.2e-3 + 2e-3, rel=0.05)


def test_the_fit_is_relative(model):
    """By absolute errors the noise of the largest sizes would be the latency."""
    sizes = [8, 80, 800, 8_000, 2_000_000, 4_000_000, 8_000_000]
    noise = [1, 1, 1, 1, 1.3, 0.8, 1.2]
    times = [(1e-3 + n / 1e8) * factor for n, factor in zip(sizes, noise, strict=True)]
    absolute = np.polyfit(sizes, times, 1)[1]
    assert abs(absolute / 1e-3 - 1) > 0.5
    assert model.fit(sizes, times).latency == pytest.approx(1e-3, rel=0.05)


@pytest.mark.parametrize(("sizes", "times"), [([8, 8], [1, 1]), ([8, 16], [1, 0]), ([8, 16], [1])])
def test_a_line_needs_two_sizes_and_positive_times(model, sizes, times):
    with pytest.raises(ValueError, match="at least two different sizes"):
        model.fit(sizes, times)


def test_every_constant_has_a_source_or_is_marked(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    constants = importlib.import_module("cost_constants")
    found = (*constants.CONSTANTS, constants.IMAGES_PER_SECOND, *constants.REPLICA_BATCHES)
    assert len({c.name for c in found}) == len(found)
    for constant in found:
        assert constant.unit
        assert constant.assumed or any(
            name in constant.source for name in ("tuning.cc at ", "README.md at ", "nccl#")
        )
