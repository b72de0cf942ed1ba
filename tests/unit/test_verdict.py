"""The verdict of `syncbn bench` follows from its figures, in every way that it can come out."""

import math
import random

import pytest

from syncbn.bench.timing import Quartiles, summarize, take_turns
from syncbn.bench.verdict import ERROR_ADDED, PRICE, Outcome, Spread, judge, worth_up_to


def around(median, spread=0.01, rounds=20):
    """Ratios of that median, half of them within the spread."""
    steps = [(2 * number / (rounds - 1) - 1) * 2 * spread for number in range(rounds)]
    return Spread.of([median + step for step in steps])


EQUAL = around(1.0)
SLOWER_KERAS = around(1.5)


def verdict(cost, *, equal=EQUAL, keras=SLOWER_KERAS, keras_local=EQUAL, batch=8):
    return judge(
        own_over_local=cost,
        equal_steps=equal,
        keras_over_own=keras,
        keras_local_over_own=keras_local,
        batch=batch,
    )


def test_a_small_cost_is_worth_it_at_a_small_batch():
    found = verdict(around(1.04), batch=8)
    assert (found.outcome, found.worth_up_to) == (Outcome.WORTH_IT, 8)
    assert "4 % longer here than with TensorFlow's fused local kernel" in found.sentence
    assert "(half of the rounds between 3 and 5 %)" in found.sentence
    assert "worth it at your 8 examples a device" in found.sentence
    assert "about 8 examples a device or fewer, and not at more" in found.sentence


def test_a_small_cost_is_not_worth_it_where_local_statistics_suffice():
    found = verdict(around(1.04), batch=64)
    assert (found.outcome, found.worth_up_to) == (Outcome.ENOUGH, 8)
    assert "your 64 examples a device are enough for local statistics" in found.sentence
    assert "Measured at 64 examples a device" in found.remarks[-1]


@pytest.mark.parametrize(("cost", "most"), [(1.3, 4), (1.8, 2), (3.0, 0)])
def test_a_large_cost_is_dear_and_larger_batches_are_the_remedy(cost, most):
    found = verdict(around(cost), batch=8)
    assert (found.outcome, found.worth_up_to) == (Outcome.DEAR, most)
    assert found.sentence.startswith("Synchronizing is dear: ")
    assert "larger batches" in found.sentence
    assert (f"about {most} examples" in found.sentence) == (most > 0)


def test_a_cost_within_what_equal_steps_differ_by_is_none():
    for cost in (0.99, 1.0, 1.015):
        found = verdict(around(cost, 0.02), equal=around(1.01, 0.02))
        assert (found.outcome, found.worth_up_to) == (Outcome.FREE, 16)
        assert "costs nothing that could be measured" in found.sentence
    assert verdict(around(1.015, 0.002), equal=around(1.0, 0.002)).outcome is Outcome.WORTH_IT


def test_what_equal_steps_differ_by_is_taken_off():
    cost = around(1.04, 0.002)
    assert verdict(cost, equal=around(1.0, 0.002)).outcome is Outcome.WORTH_IT
    for equal in (1.05, 0.95):
        assert verdict(cost, equal=around(equal, 0.002)).outcome is Outcome.FREE


def test_a_step_that_is_shorter_costs_nothing():
    assert verdict(around(0.9)).outcome is Outcome.FREE


def test_measurements_that_scatter_too_much_decide_nothing():
    found = verdict(around(1.1, 0.5), equal=around(1.0, 0.5))
    assert found.outcome is Outcome.UNDECIDED
    assert "cannot be told" in found.sentence
    assert "more --rounds" in found.sentence


@pytest.mark.parametrize(("ratio", "word"), [(1.5, "slower"), (1.0, "as fast"), (0.7, "faster")])
def test_it_says_how_fast_keras_is(ratio, word):
    remarks = verdict(around(1.04), keras=around(ratio)).remarks
    assert f"synchronized=True is {word} here" in remarks[0]
    assert f"takes {ratio:.2f} (" in remarks[0]
    assert "local BatchNormalization is as fast here" in remarks[1]
    remarks = verdict(around(1.04), keras_local=around(ratio)).remarks
    assert f"local BatchNormalization is {word} here" in remarks[1]


def test_no_sentence_says_minus_zero():
    found = verdict(around(0.999, 0.002), equal=around(1.0, 0.002))
    assert "-0" not in found.sentence


def test_the_dearer_the_fewer_examples_it_is_worth_it_for():
    most = [worth_up_to(cost / 100) for cost in range(-5, 200)]
    assert most == sorted(most, reverse=True)
    assert set(most) == {16, 8, 4, 2, 0}
    for examples, points in ERROR_ADDED.items():
        assert worth_up_to(points * PRICE) == examples
        assert worth_up_to(points * PRICE * 1.001) < examples


def test_the_rule_of_thumb_names_its_source_and_all_of_its_figures():
    remark = verdict(around(1.04)).remarks[2]
    assert "arXiv:1803.08494" in remark
    for examples, points in ERROR_ADDED.items():
        assert f"{points} at {examples}" in remark


def test_the_interval_of_the_median_holds_it_in_95_of_100_draws():
    generator = random.Random(0)
    held = sum(
        spread.at_least <= math.exp(0) <= spread.at_most
        for spread in (
            Spread.of([generator.lognormvariate(0, 1) for _ in range(20)]) for _ in range(2000)
        )
    )
    # 95.9 % for 20 values; a narrower one by an order on each side would hold 88 %.
    assert 0.945 <= held / 2000 <= 0.972


def test_six_rounds_are_the_least_that_an_interval_needs():
    spread = Spread.of([6.0, 1.0, 5.0, 2.0, 4.0, 3.0])
    assert (spread.at_least, spread.at_most) == (1.0, 6.0)
    assert spread.quartiles == Quartiles(2.25, 3.5, 4.75)


def test_everyone_is_first_in_turn_and_stops_between_steps():
    order = []
    steps = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = take_turns(steps, 3)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert "".join(order[-9:]) == "abc" + "bca" + "cab"

    def stop():
        if len(order) > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take_turns(steps, 100, stop)
    assert len(order) == 21


def test_ratios_are_taken_within_each_round():
    # The machine is twice as slow in the second round, of which the ratios know nothing.
    figures = summarize({"ours": [1.0, 2.0, 1.0], "other": [3.0, 6.0, 3.0]}, "other", "ours")
    assert figures["ours"]["times_as_fast_as_other"] == 3.0
    assert figures["ours"]["lower_quartile"] == figures["ours"]["upper_quartile"] == 3.0
    assert figures["other"]["times_as_fast_as_ours"] == pytest.approx(1 / 3, abs=1e-3)
