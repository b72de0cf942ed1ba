"""`syncbn.verify` acquits models that replicas train as one device does, and convicts the others.

What is here in float32 on two replicas, and few cases of each, is the whole table of
`tests/verified` in other dtypes and on more replicas by `make test-models`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from tests import mutants
from tests.verified.acquitted import CASES, compiled, dense, floats
from tests.verified.convicted import DEFECTS
from tests.verified.matrix import verified

import syncbn
from syncbn.verification.verdict import Cause, Kind, Outcome, Verdict

pytestmark = [
    pytest.mark.filterwarnings("ignore:Gradients do not exist"),
    pytest.mark.filterwarnings("ignore:BatchNormalization .* by its own statistics"),
]

# Of the tables: quick, and different from each other. The rest is slow.
FEW_ACQUITTED = ("two optimizers", "steps per execution")
FEW_CONVICTED = (
    "loss a mean of means",
    "own formula",
    "local moving mean",
    "metric",
    "applied apart",
    "NaN on one",
)


def eagerly(build: Callable[[], Any]) -> Callable[[], Any]:
    """The same model without graphs, whose tracing is most of the time that tests take."""

    def built() -> Any:
        model = build()
        model.run_eagerly = True
        return model

    return built


def convicted(name: str, *, eager: bool = True) -> Verdict:
    """The verdict on a defect of the table."""
    defect = DEFECTS[name]
    keras.utils.set_random_seed(0)
    return syncbn.verify(
        eagerly(defect.build) if eager else defect.build,
        defect.data(13 if defect.ragged else 8, np.random.default_rng(0)),
        steps=2,
        batch_size=8,
        repair=defect.repair,
    )


def check_convicted(name: str, *, eager: bool = True) -> None:
    """It departs by its cause, and the first finding is of the right layer."""
    verdict = convicted(name, eager=eager)
    assert verdict.outcome is Outcome.DEPARTS, verdict.summary
    first = verdict.findings[0]
    assert first.cause is DEFECTS[name].cause, verdict
    assert DEFECTS[name].layer in first.layer, verdict
    assert first.evidence
    assert first.remedy


def acquit(
    name: str, seed: int, replicas: int = 2, dtype: str = "float32", *, eager: bool = False
) -> None:
    """All agrees, with room left."""
    case = CASES[name]
    case = case._replace(build=eagerly(case.build)) if eager else case
    verdict = verified(case, seed, replicas, dtype)
    if dtype.endswith("16"):  # roundings may be too coarse for an answer
        assert verdict.outcome is not Outcome.DEPARTS, verdict
    else:
        assert verdict.agrees, verdict
    assert {one.kind for one in verdict.comparisons} >= {Kind.INPUT, Kind.OUTPUT, Kind.GRADIENT}
    nearest = max(one.excess for one in verdict.comparisons)
    assert nearest < 0.7, f"{name} is {nearest:.2g} of the way to conviction"


@pytest.mark.parametrize("name", FEW_ACQUITTED)
def test_it_acquits(name):
    acquit(name, seed=0, eager=name != "steps per execution")


@pytest.mark.parametrize("name", FEW_CONVICTED)
def test_it_convicts_by_the_right_cause(name):
    check_convicted(name)


@pytest.mark.models
@pytest.mark.parametrize("dtype", ["float32", "float64", "mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("name", [name for name in CASES if name != "jit"])
@pytest.mark.filterwarnings("ignore:.build\\(\\). was called on layer:UserWarning")
def test_it_acquits_all(name, dtype, monkeypatch):
    # oneDNN has no convolution of an empty part.
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")
    acquit(name, 1, 2 + len(name) % 3, dtype)


@pytest.mark.models
@pytest.mark.parametrize("name", DEFECTS)
def test_it_convicts_all(name):
    check_convicted(name, eager=False)


@pytest.mark.models
@pytest.mark.parametrize("name", ["MobileNetV2", "ResNet50V2", "EfficientNetB0"])
def test_it_acquits_and_convicts_a_model_of_keras_applications(name):
    def build(norm=True):
        model = getattr(keras.applications, name)(weights=None, input_shape=(64, 64, 3), classes=5)
        model = syncbn.convert(model) if norm else model
        return compiled(model, "sgd", "sparse_categorical_crossentropy")

    random = np.random.default_rng(0)
    data = random.normal(size=(16, 64, 64, 3)).astype("float32"), random.integers(0, 5, size=16)
    for norm in (True, False):
        verdict = syncbn.verify(lambda norm=norm: build(norm), data, steps=2, batch_size=8)
        if norm:
            assert verdict.outcome is not Outcome.DEPARTS or {
                finding.cause for finding in verdict.findings
            } == {Cause.RANDOM}, verdict
        else:
            causes = {finding.cause for finding in verdict.findings}
            assert Cause.LOCAL in causes, verdict


@pytest.mark.parametrize(
    ("mutant", "cause", "words"),
    [
        ("never_synchronizes", Cause.LOCAL, "its own statistics on each replica"),
        ("local_backward", Cause.GRADIENTS, "the backward of sync_batch_normalization"),
    ],
)
def test_it_convicts_our_layer_where_it_is_broken(mutant, cause, words, monkeypatch):
    from syncbn._backends.tensorflow import collectives

    for name in ("sum_over_replicas", "sum_over_group"):  # given back afterwards
        monkeypatch.setattr(collectives, name, getattr(collectives, name))
    getattr(mutants, f"_{mutant}")()
    verdict = syncbn.verify(
        eagerly(lambda: compiled(dense(), "sgd")),
        floats(5)(8, np.random.default_rng(0)),
        batch_size=8,
    )
    assert verdict.findings[0].cause is cause, verdict
    assert words in verdict.findings[0].evidence


def test_a_plain_layer_is_acquitted_where_it_is_frozen():
    """And convicted on the same data where it is not."""
    data = floats(5)(8, np.random.default_rng(0))
    shifted = data[0] + np.float32(100), data[1]

    def build(trainable):
        model = dense(norm=keras.layers.BatchNormalization)
        model.layers[1].trainable = trainable
        return compiled(model, "sgd")

    assert syncbn.verify(eagerly(lambda: build(False)), shifted, batch_size=8).agrees
    assert not syncbn.verify(eagerly(lambda: build(True)), shifted, batch_size=8).agrees


def test_each_step_starts_from_the_state_of_one_device():
    """A departure in the first step is none in a later one that it does not touch."""
    verdict = convicted("loss a mean of means")
    departed = {one.step for one in verdict.comparisons if not one.agrees}
    assert departed == {2}  # the uneven one


def pooled() -> keras.Model:
    """Its gradients are sums over 6272 positions, whose terms nearly cancel."""
    return compiled(
        keras.Sequential(
            [
                keras.Input((16, 16, 3)),
                keras.layers.Conv2D(8, 3, use_bias=False),
                syncbn.SyncBatchNormalization(),
                keras.layers.ReLU(),
                keras.layers.GlobalAveragePooling2D(),
                keras.layers.Dense(3, activation="softmax"),
            ]
        ),
        loss="sparse_categorical_crossentropy",
    )


def test_sums_that_cancel_acquit():
    """Of these two initializations one device's own order of examples moves gradients further
    than eight times what roundings of inputs do."""
    random = np.random.default_rng(0)
    data = random.normal(size=(40, 16, 16, 3)).astype("float32"), random.integers(3, size=40)
    for seed in (1, 2):
        keras.utils.set_random_seed(seed)
        verdict = syncbn.verify(eagerly(pooled), data, repair=True)
        assert verdict.agrees, verdict
        assert max(one.excess for one in verdict.comparisons) < 0.7


@pytest.mark.parametrize("name", ["gradients off", "alternating, gradients off"])
def test_an_order_that_changes_outputs_acquits_no_gradient(name):
    check_convicted(name)


def test_builds_have_the_same_names():
    verdict = convicted("own formula")
    assert {one.layer for one in verdict.comparisons} <= {
        layer.path for layer in verdict.layers
    } | {""}
    assert "standardized" in {layer.path for layer in verdict.layers}


def test_dropout_is_said_and_then_held_still():
    verdict = convicted("dropout")
    assert verdict.findings[0].cause is Cause.RANDOM
    assert len(verdict.findings) == 1
    assert "all else agrees" in verdict.summary
