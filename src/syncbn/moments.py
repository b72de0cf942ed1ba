"""Moments of a set of elements, and how the moments of several sets become those of their union.

Pure maths over any array namespace `xp` that offers `concatenate`, `maximum`, `minimum`, `sum`,
`where` and `zeros_like` as NumPy defines them, so that there is one copy for every backend and the
tests.

Two forms travel between replicas, both of a size that does not depend on the elements:

* the *sum form* `(n, n·mean, M2 + n·mean²)`, 2C+1 numbers that merge by plain addition. It needs
  float64: at mean/std = 1e4 the last term carries eight digits of mean² before the first digit of
  the variance;
* the *table form*, one row `(n, mean, M2)` a replica, merged by Chan's formula. It keeps float32's
  accuracy where float64 does not exist, at R times the size.

References:
    Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", Stanford STAN-CS-79-773, 1979.
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = [
    "Moments",
    "as_divisor",
    "merge",
    "merge_table",
    "pack_row",
    "pack_sums",
    "unpack_sums",
]


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations of the elements of each channel."""

    count: Any  # shape () or (C,): elements of a channel, or the sum of their weights; may be 0
    mean: Any  # shape (C,); 0 where count is 0
    m2: Any  # shape (C,): Σ (x − mean)²; 0 where count is 0

    def variance(self, xp: Any) -> Any:
        """Biased variance `M2 / n`, shape (C,), as Keras keeps it; 0 for an empty set."""
        return self.m2 / as_divisor(self.count, xp)

    def unbiased_variance(self, xp: Any) -> Any:
        """Bessel's `M2 / (n − 1)`, shape (C,), as torch keeps it.

        A sum of weights may be between 1 and 2, where n − 1 would blow it up, or below: there M2
        over 1, or the biased M2 / n. For whole numbers of elements it is Bessel's.
        """
        ones = xp.zeros_like(self.count) + 1
        divisor = xp.maximum(self.count - 1, xp.minimum(self.count, ones))
        return self.m2 / as_divisor(divisor, xp)


def as_divisor(count: Any, xp: Any) -> Any:
    """The count, or something tiny for 0: of an empty set every sum is 0, and stays 0."""
    return xp.maximum(count, 1e-30)


def merge(first: Moments, second: Moments, xp: Any) -> Moments:
    """Moments of the union of two sets, either of which may be empty; by Chan's formula."""
    count = first.count + second.count
    share = second.count / as_divisor(count, xp)
    difference = second.mean - first.mean
    m2 = first.m2 + second.m2 + difference * difference * (first.count * share)
    return Moments(count, first.mean + difference * share, m2)


def pack_sums(moments: Moments, xp: Any) -> Any:
    """The sum form, shape (2C+1,): `(n, n·mean, M2 + n·mean²)`. Its inputs should be float64."""
    count, mean, m2 = moments
    total = count * mean
    return xp.concatenate([_as_vector(count), total, m2 + total * mean])


def _as_vector(count: Any) -> Any:
    return count if len(count.shape) else count[None]


def unpack_sums(payload: Any, xp: Any, *, one_count: bool = True) -> Moments:
    """Moments of the union, from the sum over all sets of their sum forms.

    Args:
        payload: shape (2C+1,), or (3C,) with a count for each channel.
        xp: the array namespace.
        one_count: whether all channels have the same count.
    """
    counts = _counts(payload.shape[0], one_count)
    channels = (payload.shape[0] - counts) // 2
    count, total = payload[0] if one_count else payload[:counts], payload[counts:][:channels]
    mean = total / as_divisor(count, xp)
    m2 = payload[counts + channels :] - total * mean
    # Rounding may leave a constant channel a hair below zero, of which rsqrt would make NaN.
    return Moments(count, mean, xp.maximum(m2, 0.0))


def _counts(numbers: int, one_count: bool) -> int:
    """How many of the numbers of a payload are counts."""
    return 1 if one_count else numbers // 3


def pack_row(moments: Moments, xp: Any) -> Any:
    """One row of the table form, shape (2C+1,): `(n, mean, M2)`."""
    count, mean, m2 = moments
    return xp.concatenate([_as_vector(count), mean, m2])


def merge_table(table: Any, xp: Any, *, one_count: bool = True) -> Moments:
    """Moments of the union, from a table of shape (R, 2C+1), or (R, 3C), with one row a set.

    What is summed are the deviations from a pivot, so that it is of the size of the differences
    between the sets, not of the offset that they share; rounding in the pivot cancels.
    """
    width = _counts(table.shape[1], one_count)
    channels = (table.shape[1] - width) // 2
    counts = table[:, :width]
    means = table[:, width : width + channels]
    count = xp.sum(counts, axis=0)
    divisor = as_divisor(count, xp)
    pivot = xp.sum(counts * means, axis=0) / divisor
    deviations = xp.where(counts > 0, means - pivot, xp.zeros_like(means))
    shift = xp.sum(counts * deviations, axis=0) / divisor
    m2 = xp.sum(table[:, width + channels :] + counts * (deviations - shift) ** 2, axis=0)
    return Moments(count[0] if one_count else count, pivot + shift, m2)
