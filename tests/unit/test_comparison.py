"""The table of the main job: differences by weight and by moving statistic."""

import math

import numpy as np

from syncbn._backends.tensorflow.loop import Score
from syncbn.training.comparison import differences, rows
from syncbn.training.job import Epoch, Run, plan
from syncbn.training.settings import TrainSettings

MOVING = [False, True]


def run(name, *weights):
    score = Score(1.0, 0.5)
    epochs = [
        Epoch(number, score, score, 2.0, [np.array(w, np.float32) for w in pair])
        for number, pair in enumerate(weights, 1)
    ]
    return Run(name, "sync", 2, epochs)


REFERENCE = run("one device", ([1.0, 2.0], [3.0]), ([1.0, 2.0], [4.0]))


def test_the_largest_difference_of_each_kind():
    (first, second) = differences(
        run("a", ([1.5, 2.0], [3.0]), ([1.0, 1.0], [6.0])), REFERENCE, MOVING
    )
    assert first == (0.5, 0.0)
    assert second == (1.0, 2.0)


def test_a_nan_is_not_lost():
    (first,) = differences(run("a", ([math.nan, 2.0], [3.0])), REFERENCE, MOVING)
    assert math.isnan(first.weights)


def test_the_reference_comes_first_and_runs_without_an_epoch_not_at_all():
    table = rows(
        [run("sync × 2", ([1.0, 2.0], [3.0]), ([1.0, 2.0], [4.0])), REFERENCE, run("b")], MOVING
    )
    assert [row.run for row in table] == ["one device", "sync × 2"]
    assert table[0].difference is None
    assert table[1].difference == (0.0, 0.0)
    assert table[1].seconds == 4.0


def test_runs_of_different_length_are_not_compared():
    table = rows([run("sync × 2", ([1.0, 2.0], [3.0])), REFERENCE], MOVING)
    assert table[1].difference is None


def test_a_comparison_has_every_normalization_once_and_the_wanted_one_first():
    names = [run.name for run in plan(TrainSettings(norm="keras", replicas=4, compare=True))]
    assert names == ["keras × 4", "one device", "reordered", "sync × 4", "local × 4"]
    assert [run.name for run in plan(TrainSettings())] == ["sync × 2"]
    assert [run.replicas for run in plan(TrainSettings(strategy="none"))] == [1]
