"""The parts of `verify` that need no training: whose rows, by what statistics, and bad input."""

from __future__ import annotations

import sys
import textwrap

import keras
import numpy as np
import pytest

import syncbn
from syncbn.errors import InputError
from syncbn.verification.aligning import difference, gathered, parts_of
from syncbn.verification.batches import load_file, make_batches
from syncbn.verification.measuring import Measured
from syncbn.verification.normalization import Normalization, by_the_global_batch, hypotheses
from syncbn.verification.program import built_model, load_function, name_of
from syncbn.verification.recording import LayerCall, Structure
from syncbn.verification.tolerances import Tolerances, rounding
from syncbn.verification.verdict import Comparison, Kind

RANDOM = np.random.default_rng(0)


def test_rows_are_found_by_their_content_in_any_order():
    whole = [RANDOM.normal(size=(5, 3)), np.arange(5)]
    held = {0: [part[[4, 1]] for part in whole], 1: [part[[0, 3, 2]] for part in whole]}
    parts = parts_of(whole, held, 2, shared=False)
    assert parts.complete
    assert parts.sizes == [2, 3]
    values = {replica: arrays[0] * 2 for replica, arrays in held.items()}
    np.testing.assert_array_equal(gathered(values, parts, whole[0], shared=False), whole[0] * 2)


def test_rows_that_are_the_same_are_each_counted_once():
    whole = [np.zeros((4, 2))]
    parts = parts_of(whole, {0: [np.zeros((2, 2))], 1: [np.zeros((2, 2))]}, 2, shared=False)
    assert parts.complete
    assert sorted(np.concatenate([*parts.rows.values()])) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (slice(0, 4), slice(0, 4), "0 of the 4 examples on no replica, and 4"),
        (slice(0, 2), slice(0, 2), "2 of the 4 examples on no replica, and 2"),
        (slice(0, 2), slice(2, 3), "1 of the 4 examples on no replica, and 0"),
    ],
)
def test_other_data_than_the_batch_are_said(first, second, words):
    whole = [RANDOM.normal(size=(4, 2))]
    parts = parts_of(whole, {0: [whole[0][first]], 1: [whole[0][second]]}, 2, shared=False)
    assert not parts.complete
    assert parts.words.startswith(words)


def test_an_empty_part_takes_no_rows():
    whole = [RANDOM.normal(size=(2, 2))]
    parts = parts_of(whole, {0: [whole[0]], 1: [np.zeros((0, 2))]}, 2, shared=False)
    assert parts.complete
    assert parts.order == [0]


def test_several_rows_an_example_are_put_together():
    whole = [RANDOM.normal(size=(3, 2))]
    parts = parts_of(whole, {0: [whole[0][[2]]], 1: [whole[0][:2]]}, 2, shared=False)
    reference = np.arange(6.0)[:, None]
    values = {0: reference[4:], 1: reference[:4]}
    np.testing.assert_array_equal(gathered(values, parts, reference, shared=False), reference)


def test_a_difference_is_relative_to_the_largest_value_and_nan_where_one_is_not_finite():
    assert difference([1.0, 4.0], [1.0, 2.0]) == 1.0
    assert difference([np.nan, 2.0], [np.nan, 2.0]) == 0.0
    assert np.isnan(difference([np.nan, 2.0], [1.0, 2.0]))
    assert np.isnan(difference([1.0], [1.0, 2.0]))
    assert not Comparison(Kind.OUTPUT, "a", "a", 1, float("nan"), 1.0).agrees


def normalization(**options):
    parts = {0: RANDOM.normal(size=(3, 2)), 1: RANDOM.normal(loc=1.0, size=(5, 2))}
    counts = {replica: np.ones(len(x)) for replica, x in parts.items()}
    counts[1][-1] = 0.0
    return Normalization(
        parts=parts,
        counts=counts,
        outputs={},
        gamma=np.array([1.0, 2.0]),
        beta=np.zeros(2),
        epsilon=1e-3,
        **options,
    )


@pytest.mark.parametrize(
    "name",
    ["global", "local", "equal weights", "equal weights, within", "without the mask", "groups"],
)
def test_each_way_to_normalize_is_told_from_the_others(name):
    layer = normalization(groups=[[0], [1]])
    ways = {"global": by_the_global_batch(layer), **hypotheses(layer)}
    layer = layer._replace(outputs=dict(layer.expected(ways[name])))
    for other, statistics in ways.items():
        # Groups of one are the local statistics.
        same = other == name or {other, name} == {"groups", "local"}
        assert (layer.difference(statistics) < 1e-12) == same, other


def test_global_statistics_count_elements():
    layer = normalization()
    mean, variance = by_the_global_batch(layer)[0]
    together = np.concatenate([layer.parts[0], layer.parts[1][:-1]])
    np.testing.assert_allclose(mean, together.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(variance, together.var(axis=0), rtol=1e-12)


def structure(dtype, calls):
    return Structure(
        "model", tuple(LayerCall(f"layer_{n}", "Layer", dtype) for n in range(calls)), ()
    )


def test_tolerances_follow_dtype_depth_and_what_one_device_makes_of_roundings():
    last = Measured(Kind.OUTPUT, "layer_3", "layer_3", 1e-3)
    fine = Tolerances(structure("float32", 4), False)
    epsilon = float(np.finfo("float32").eps)
    assert fine.of(last) == pytest.approx(8 * 2 * epsilon)
    fine.note(last)
    fine.note(last._replace(difference=1e-4))
    assert fine.of(last) == pytest.approx(8 * (2 * epsilon + 1e-3))
    gradient = Measured(Kind.GRADIENT, "kernel", "layer_0", 0.0)
    assert fine.of(gradient) == pytest.approx(8 * epsilon * 8**0.5)
    assert fine.of(Measured(Kind.SPREAD, "kernel", "layer_0", 0.0)) == 0.0
    exact = Tolerances(structure("float64", 4), False)
    assert exact.of(last) < 1e-14
    assert exact.of(Measured(Kind.LOSS, "loss", "", 0.0)) == pytest.approx(8 * 2 * epsilon)
    short = Tolerances(structure("bfloat16", 4), False)
    assert short.of(last) == pytest.approx(4 * 2 * rounding("bfloat16"))
    assert Tolerances(structure("float32", 4), True).epsilon == 2.0**-10


# What users get wrong.


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ((), "require arrays"),
        ((None,), "require arrays"),
        ((np.zeros((4, 2)),) * 4, "require arrays"),
        ((np.zeros((4, 2)), np.zeros(3)), "arrays of 3 and 4 rows"),
        ((np.zeros((0, 2)),), "at least one"),
        ((np.array([object()] * 4),), "arrays of numbers"),
        ((np.float32(1.0),), "arrays of numbers"),
        ((np.zeros((1, 2)),), "2 replicas require at least as many examples"),
    ],
)
def test_data_that_are_none_are_refused(data, words):
    with pytest.raises(InputError, match=words):
        make_batches(data, 2, 5, None)


def test_the_last_batch_is_what_an_epoch_leaves():
    x = np.arange(37)[:, None]
    batches = make_batches((x,), 2, 3, 8)
    assert batches.sizes == [8, 8, 5]
    np.testing.assert_array_equal(batches.x[-5:], x[-5:])
    assert make_batches((x,), 2, 9, 8).steps == 5


def test_a_file_is_read_by_the_names_of_its_arrays(tmp_path):
    np.savez(tmp_path / "data.npz", x_train=np.zeros((3, 1)), labels=np.ones(3))
    x, y, weights = load_file(tmp_path / "data.npz")
    assert (x.shape, y.shape, weights) == ((3, 1), (3,), None)


@pytest.mark.parametrize("kind", ["absent", "text", "objects", "other names", "cut"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, kind):
    path = tmp_path / "data.npz"
    if kind == "text":
        path.write_text("no arrays")
    elif kind == "objects":
        np.savez(path, x=np.array([{}], dtype=object))
    elif kind == "other names":
        np.savez(path, pictures=np.zeros(3))
    elif kind == "cut":
        np.savez(path, x=np.zeros((99, 9)))
        path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match=r"data\.npz"):
        load_file(path)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of the user's and names it."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)

    def write(text):
        (tmp_path / "users_own.py").write_text(textwrap.dedent(text))
        return "users_own"

    yield write
    sys.modules.pop("users_own", None)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("users_own", "", "requires module:function"),
        ("users_own:", "", "requires module:function"),
        (":build", "", "requires module:function"),
        ("nowhere_at_all:build", "", "Start in the folder"),
        ("nowhere.py:build", "", "which is no file"),
        ("users_own:build", "import nowhere_at_all", "ModuleNotFoundError"),
        ("users_own:build", "def build(:", "SyntaxError"),
        ("users_own.py:build", "1 / 0", "ZeroDivisionError"),
        ("users_own:build", "raise SystemExit(3)", "SystemExit"),
        ("users_own:build", "def make(): pass", "It has: make"),
        ("users_own:build", "build = 3", "has no function"),
    ],
)
def test_a_program_that_cannot_be_had_is_said_in_a_line(module, name, text, words):
    module(text)
    with pytest.raises(InputError, match=words):
        load_function(name)


def test_a_function_is_found_again_by_its_name(module):
    function = load_function(f"{module('def build(): return 3')}:build")
    assert load_function(name_of(function)) is function
    with pytest.raises(InputError, match="top of a module"):
        name_of(lambda: None)


def small(compiled=True):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    if compiled:
        model.compile("sgd", "mse")
    return model


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: None, "returns a keras.Model. Received: builtins.NoneType"),
        (lambda: small(compiled=False), "one that is compiled"),
        (lambda name: keras.Model(name=name), "without arguments"),
    ],
)
def test_a_function_that_returns_no_model_to_train_is_refused(build, words):
    with pytest.raises(InputError, match=words):
        built_model(build, make_batches((np.zeros((4, 2)),), 2, 1, 4))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (np.zeros((4, 3)), "requires inputs of shape"),
        ([np.zeros((4, 2)), np.zeros((4, 2))], r"requires 1 input\(s\)"),
    ],
)
def test_data_of_another_shape_than_the_model_takes_are_refused(data, words):
    with pytest.raises(InputError, match=words):
        built_model(small, make_batches((data,), 2, 1, 4))


def test_builds_do_not_count_the_layers_of_the_process():
    batches = make_batches((np.zeros((4, 2)),), 2, 1, 4)
    before = keras.layers.Dense(1).name
    assert built_model(small, batches).layers[0].name == "dense"
    assert built_model(small, batches).layers[0].name == "dense"
    assert keras.layers.Dense(1).name not in {"dense", before}


@pytest.mark.parametrize(
    "wrong",
    [{"replicas": 1}, {"replicas": "2"}, {"steps": 0}, {"batch_size": 0}, {"workers": 1}],
)
def test_numbers_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        syncbn.verify(small, (np.zeros((4, 2)), np.zeros((4, 1))), **wrong)


def test_a_model_in_place_of_its_function_is_refused():
    with pytest.raises(InputError, match="function itself"):
        syncbn.verify(3, (np.zeros((4, 2)),))
