"""Whether synchronizing is worth what it costs, from measurements: pure arithmetic and words.

What local statistics lose is taken from one study: ResNet-50 on ImageNet, batch normalization by
the examples of one GPU, top-1 validation error at 32, 16, 8, 4 and 2 examples 23.6, 23.7, 24.8,
27.3 and 34.7 %. What that is worth in time is a matter of choice: a point of error counts as much
as a step `PRICE` longer.

References:
    Wu and He, "Group Normalization", arXiv:1803.08494, 2018: figure 1 and table 2.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from typing import NamedTuple

from syncbn.bench.timing import Quartiles

__all__ = ["ERROR_ADDED", "PRICE", "Outcome", "Spread", "Verdict", "judge", "worth_up_to"]

# Points of error more than at 32 examples a device.
ERROR_ADDED = {16: 0.1, 8: 1.2, 4: 3.7, 2: 11.1}
# By how much longer a step may be for one point of error.
PRICE = 0.10


class Spread(NamedTuple):
    """A ratio's quartiles over the rounds, and where its median lies with 95 % confidence.

    The quartiles say how much single rounds differ; what can be told from the rounds together is
    narrower, and decides.
    """

    quartiles: Quartiles
    at_least: float
    at_most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least 6 values: the interval between order statistics, whatever the distribution.

        Between the k-th smallest and the k-th largest of n values lies the median, unless fewer
        than k of them fell on one side of it: a matter of n tosses of a coin.
        """
        ordered = sorted(values)
        count = len(ordered)
        rank, tail = 0, 0.5**count  # of fewer than `rank + 1` on one side
        while 2 * (tail + math.comb(count, rank + 1) * 0.5**count) <= 0.05:
            rank += 1
            tail += math.comb(count, rank) * 0.5**count
        return cls(Quartiles.of(ordered), ordered[rank], ordered[-1 - rank])

    def minus_one(self) -> Spread:
        """How much more than equal."""
        quartiles = Quartiles(*(value - 1 for value in self.quartiles))
        return Spread(quartiles, self.at_least - 1, self.at_most - 1)


class Outcome(enum.StrEnum):
    """What the measurements came to."""

    FREE = "free"  # no cost beyond what two equal steps differ by
    WORTH_IT = "worth it"
    ENOUGH = "enough examples"  # cheap, but local statistics lose less than it costs
    DEAR = "dear"
    UNDECIDED = "undecided"  # the measurements scatter too much


class Verdict(NamedTuple):
    """The outcome, the examples a device up to which synchronizing is worth it, and the words."""

    outcome: Outcome
    worth_up_to: int
    remarks: list[str]
    sentence: str


def worth_up_to(cost: float) -> int:
    """The most examples a device at which local statistics lose more than a step so much longer.

    Args:
        cost: by how much of itself the step is longer; 0.04 for 4 %.

    Returns:
        A key of `ERROR_ADDED`, or 0 where it is not worth it even at the smallest.
    """
    return max((n for n, points in ERROR_ADDED.items() if points * PRICE >= cost), default=0)


def judge(
    own_over_local: Spread,
    equal_steps: Spread,
    keras_over_own: Spread,
    keras_local_over_own: Spread,
    batch: int,
) -> Verdict:
    """The verdict on a step of training, of which `batch` examples are on each device.

    Args:
        own_over_local: seconds of the step with synchronized layers, relative to the least that
            local ones take, with TensorFlow's fused kernel.
        equal_steps: those of one step with local layers, relative to another just like it.
        keras_over_own: those with Keras's synchronized layers, relative to ours.
        keras_local_over_own: those with Keras's local layers, relative to ours.
        batch: examples on each device.
    """
    cost = own_over_local.minus_one()
    equal = equal_steps.minus_one()
    # Chance is in the intervals; what two equal steps differ by beyond it, in where their memory
    # lies or which was traced first, is in none.
    noise = abs(equal.quartiles.median)
    most = worth_up_to(cost.quartiles.median)
    remarks = [
        _beside("Keras's own synchronized=True", keras_over_own, noise),
        _beside("Keras's local BatchNormalization", keras_local_over_own, noise),
        _rule_of_thumb(),
    ]
    if batch > most:
        remarks.append(
            f"Measured at {batch} examples a device: with fewer, synchronizing is a larger share "
            "of a step; --batch measures that."
        )
    longer = (
        f"{_percent(cost.quartiles.median)} longer here than with TensorFlow's fused local kernel "
        f"({_range(cost.quartiles)})"
    )
    if cost.at_least <= noise:
        if worth_up_to(cost.at_most) < 8:
            return Verdict(Outcome.UNDECIDED, most, remarks, _undecided(cost, noise))
        return Verdict(Outcome.FREE, max(ERROR_ADDED), remarks, _free(cost, noise))
    if most < 8:
        return Verdict(Outcome.DEAR, most, remarks, _dear(longer, most, batch))
    outcome = Outcome.WORTH_IT if batch <= most else Outcome.ENOUGH
    here = (
        f"worth it at your {batch} examples a device"
        if batch <= most
        else f"your {batch} examples a device are enough for local statistics"
    )
    sentence = (
        f"Synchronizing makes a step of training {longer}: {here}; it is worth it at about "
        f"{most} examples a device or fewer, and not at more."
    )
    return Verdict(outcome, most, remarks, sentence)


def _free(cost: Spread, noise: float) -> str:
    return (
        f"Synchronizing costs nothing that could be measured here ({_range(cost.quartiles)} of a "
        "step of training with TensorFlow's fused local kernel, where two equal steps differ by "
        f"{_percent(noise)}): worth it at about {max(ERROR_ADDED)} examples a device or fewer, and "
        "harmless at more."
    )


def _undecided(cost: Spread, noise: float) -> str:
    return (
        f"Whether synchronizing is worth it here cannot be told: it makes a step of training "
        f"between {_percent(cost.at_least)} and {_percent(cost.at_most)} longer, where two equal "
        f"steps differ by {_percent(noise)}; run it on a quieter machine or with more --rounds."
    )


def _dear(longer: str, most: int, batch: int) -> str:
    worth = (
        f"worth it at about {most} examples a device or fewer"
        if most
        else "more than local statistics lose even at 2 examples a device"
    )
    remedy = "; with more, local statistics cost less"
    if batch > most:
        remedy = "; larger batches on each device make it a smaller share, and need it less"
    return f"Synchronizing is dear: it makes a step of training {longer}, {worth}{remedy}."


def _beside(what: str, over_own: Spread, noise: float) -> str:
    quartiles = over_own.quartiles
    times = f"{quartiles.median:.2f} ({quartiles.low:.2f} to {quartiles.high:.2f})"
    word = "as fast"
    if over_own.at_least > 1 + noise:
        word = "slower"
    elif over_own.at_most < 1 - noise:
        word = "faster"
    step = f"its step of training takes {times} times as long as with syncbn"
    return f"{what} is {word} here: {step}."


def _rule_of_thumb() -> str:
    points = ", ".join(f"{added} at {n}" for n, added in ERROR_ADDED.items())
    return (
        f"Local statistics added to the error of ResNet-50 on ImageNet, in points: {points} "
        "examples a device, against 32 (Wu and He, arXiv:1803.08494). One point counts here as "
        f"much as a step {_percent(PRICE)} longer."
    )


def _percent(value: float) -> str:
    # Not "-0".
    return f"{round(100 * value) + 0} %"


def _range(quartiles: Quartiles) -> str:
    low, high = (round(100 * value) + 0 for value in (quartiles.low, quartiles.high))
    return f"half of the rounds between {low} and {high} %"
