"""Moments: merging sets gives what the union gives, in both forms. NumPy only, no framework."""

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncbn.moments import Moments, merge, merge_table, pack_row, pack_sums, unpack_sums

CHANNELS = 3


def moments_of(x, dtype=np.float64):
    x = x.astype(np.float64)
    mean = x.mean(axis=0) if len(x) else np.zeros(x.shape[1])
    return Moments(
        np.array(len(x), dtype), mean.astype(dtype), ((x - mean) ** 2).sum(axis=0).astype(dtype)
    )


def merged(form, parts, dtype=np.float64):
    moments = [moments_of(part, dtype) for part in parts]
    if form == "sums":
        return unpack_sums(sum(pack_sums(m, np) for m in moments), np)
    if form == "pairs":
        return functools.reduce(lambda first, second: merge(first, second, np), moments)
    return merge_table(np.stack([pack_row(m, np) for m in moments]), np)


@st.composite
def splits(draw):
    sizes = draw(st.lists(st.integers(0, 30), min_size=1, max_size=8))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    offset = draw(st.sampled_from([0.0, -5.0, 1e3]))
    spread = draw(st.sampled_from([0.0, 1.0, 50.0]))
    return [rng.normal(offset + spread * rng.normal(), 1, (size, CHANNELS)) for size in sizes]


@pytest.mark.parametrize("form", ["sums", "table", "pairs"])
@given(parts=splits())
def test_merging_gives_the_moments_of_the_union(form, parts):
    union = moments_of(np.concatenate(parts))
    result = merged(form, parts)
    assert result.count == union.count
    scale = 1 + np.abs(union.mean)
    assert (np.abs(result.mean - union.mean) <= 1e-12 * scale).all()
    # The sum form carries count·mean² beside M2: what rounding of that leaves.
    allowed = 1e-12 * union.m2 + 1e-14 * union.count * (scale**2 + union.m2)
    assert (np.abs(result.m2 - union.m2) <= allowed).all()
    assert (result.variance(np) >= 0).all()


def test_float32_table_keeps_the_variance_at_a_large_mean():
    rng = np.random.default_rng(0)
    parts = [rng.normal(1e4 + r, 1, (50 + r, CHANNELS)) for r in range(4)]
    expected = np.concatenate(parts).var(axis=0)
    table = merged("table", parts, np.float32)
    assert table.m2.dtype == np.float32
    assert np.abs(table.variance(np) / expected - 1).max() < 1e-3
    # The sum form in float32 would not: that is why it needs float64.
    sums = merged("sums", parts, np.float32)
    assert np.abs(sums.variance(np) / expected - 1).max() > 0.1


@pytest.mark.parametrize("form", ["sums", "table"])
def test_nothing_but_empty_sets_is_an_empty_set(form):
    result = merged(form, [np.zeros((0, CHANNELS))] * 2)
    for part in (result.count, result.mean, result.m2, result.variance(np)):
        assert not np.any(part)


def test_a_constant_channel_never_has_a_negative_variance():
    for value in np.random.default_rng(0).normal(0, 1e6, 200):
        parts = [np.full((size, 1), value) for size in (7, 3, 0, 11)]
        assert merged("sums", parts).m2 >= 0


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_payloads_have_2c_plus_1_numbers(channels):
    moments = moments_of(np.random.default_rng(0).normal(size=(4, channels)))
    assert pack_sums(moments, np).shape == pack_row(moments, np).shape == (2 * channels + 1,)
