"""The table of the main job: differences by weight and by moving statistic."""

import math

import numpy as np
import pytest

from syncbn._backends.classifier import Score
from syncbn.errors import InputError
from syncbn.training.comparison import differences, rows
from syncbn.training.data import Dataset
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


def test_of_a_comparison_on_workers_the_runs_on_one_device_are_not_theirs():
    runs = plan(TrainSettings(strategy="multiworker", workers=3, compare=True))
    assert {run.name: (run.replicas, run.by_workers) for run in runs} == {
        "sync × 3 workers": (3, True),
        "one device": (1, False),
        "reordered": (1, False),
        "local × 3 workers": (3, True),
        "keras × 3 workers": (3, True),
    }


def test_more_workers_than_images_are_refused():
    images, labels = np.zeros((3, 4, 4, 1), np.float32), np.zeros(3, np.int32)
    few = Dataset("few", images, labels, images, labels, classes=2)
    TrainSettings(strategy="multiworker", workers=3, replicas=4).check_against(few)
    with pytest.raises(InputError, match="training on 4 workers needs at least as many images"):
        TrainSettings(strategy="multiworker", workers=4).check_against(few)
