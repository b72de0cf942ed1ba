"""What the doctor makes of what was measured: a layer that does not synchronize is convicted."""

import json

import numpy as np
import pytest

from syncbn.doctor import table, verdict
from syncbn.doctor.children import Outcome
from syncbn.doctor.findings import Finding
from syncbn.doctor.machine import Machine
from syncbn.doctor.probes.start import EPSILON, MOMENTUM, Case, Probe, judge
from syncbn.doctor.text import text_of

OURS = "syncbn.SyncBatchNormalization()"
NATIVE = "BatchNormalization(synchronized=True)"
CASES = ("equal parts", "unequal parts", "masked", "large mean")
SUBJECT = table.Subject("keras", "tensorflow", (2, 21), (3, 15))
MACHINE = Machine({"python": "3.11.7"}, {}, "tensorflow", "Keras's default", False, ())


def normalized(case, mean, variance):
    return [(part - mean) / np.sqrt(variance + EPSILON) for part in case.parts]


def cases(tmp_path):
    return {case.name: case for case in Probe(str(tmp_path / "records")).cases()}


def concatenated(case):
    kept = [p[m] for p, m in zip(case.parts, case.masks, strict=True)] if case.masks else [
        part.reshape(-1, part.shape[-1]) for part in case.parts
    ]  # fmt: skip
    return np.concatenate(kept).astype(np.float64)


@pytest.mark.parametrize("name", CASES)
def test_the_judge_knows_global_from_local_statistics(name, tmp_path):
    case = cases(tmp_path)[name]
    everything = concatenated(case)
    outputs = normalized(case, everything.mean(0), everything.var(0))
    assert judge(case, {"outputs": outputs})["by"] == "global"
    local = []
    for number, part in enumerate(case.parts):
        masks = None if case.masks is None else [case.masks[number]]
        own = concatenated(Case("", [part], masks))
        local += normalized(Case("", [part]), own.mean(0), own.var(0))
    judged = judge(case, {"outputs": local})
    assert judged["by"] == "local"
    assert judged["error"] > 1


@pytest.mark.parametrize("name", CASES)
def test_the_judge_knows_what_is_neither(name, tmp_path):
    case = cases(tmp_path)[name]
    everything = concatenated(case)
    mean, variance = everything.mean(0), everything.var(0)
    wrong = normalized(case, mean, 2 * variance)
    assert judge(case, {"outputs": wrong})["by"] == "neither"
    nothing = [np.full_like(part, np.nan) for part in case.parts]
    judged = judge(case, {"outputs": nothing})
    assert (judged["by"], judged["error"]) == ("neither", None)


def test_the_judge_knows_an_ignored_mask_and_counts_no_masked_element(tmp_path):
    case = cases(tmp_path)["masked"]
    assert len({mask.sum() for mask in case.masks}) == 2
    everything = concatenated(case._replace(masks=None))
    outputs = normalized(case, everything.mean(0), everything.var(0))
    assert judge(case, {"outputs": outputs})["by"] == "global, mask ignored"
    everything = concatenated(case)
    outputs = normalized(case, everything.mean(0), everything.var(0))
    for output, mask in zip(outputs, case.masks, strict=True):
        output[~mask] = np.nan
    assert judge(case, {"outputs": outputs})["by"] == "global"


def test_the_judge_sees_moving_statistics_that_differ(tmp_path):
    case = cases(tmp_path)["equal parts"]
    everything = concatenated(case)
    outputs = normalized(case, everything.mean(0), everything.var(0))
    right = (1 - MOMENTUM) * everything.mean(0)
    same = judge(case, {"outputs": outputs, "copies": [right, right], "read": right})
    assert same["moving_spread"] == 0
    assert same["moving_read_error"] < 1e-6
    differing = judge(case, {"outputs": outputs, "copies": [right, right + 1], "read": right + 1})
    assert differing["moving_spread"] == pytest.approx(1)
    assert differing["moving_read_error"] == pytest.approx(1)


def measured(layer, by=("global",) * 4, **more):
    for case, one in zip(CASES, by, strict=True):
        found = {"failed": one} if ":" in one else {"by": one, "error": 1.0, "tolerance": 1e-3}
        yield {"measured": {"layer": layer, "case": case, **found, **more}}


def outcome(layers, ended="well", **more):
    """Of a trial that found that of each layer."""
    roles = {OURS: "ours", NATIVE: "native"}
    found = [{"backend": "tensorflow", "replicas": "2 virtual CPU devices"}]
    for layer, by in layers.items():
        found.append({"layer": {"name": layer, "role": roles.get(layer, "plain")}})
        found += measured(layer, by)
    return Outcome(ended, more.pop("status", 0), "the last thing", found, **more)


def report(layers, findings=(), **more):
    trial = outcome(layers, **more)
    return verdict.by_trial(SUBJECT, table.read(), MACHINE, "tensorflow", trial, {}, list(findings))


RIGHT = ("global",) * 4
NO_MASK = ("global", "global", "local", "neither")
LOCAL = ("local",) * 4


def test_ours_right_is_available_and_what_is_wrong_with_the_native_one_is_said():
    found = report({"BatchNormalization()": LOCAL, NATIVE: NO_MASK, OURS: RIGHT})
    assert found.exit_code == 0
    assert found.sentence == (
        f"Yes: {OURS} synchronizes here in every case that was tried; {NATIVE} does not with a "
        "mask, nor with a mean of 1e4."
    )


@pytest.mark.parametrize("wrong", range(4))
@pytest.mark.parametrize("by", ["local", "neither", "global, mask ignored", "ValueError: no"])
def test_ours_wrong_in_one_case_is_not_available(wrong, by):
    """Whatever the native one does: who relies on ours has to know."""
    ours = [*RIGHT]
    ours[wrong] = by
    found = report({NATIVE: RIGHT, OURS: tuple(ours)})
    assert found.exit_code == 1
    assert found.sentence.startswith(f"No: {OURS} ")


@pytest.mark.parametrize(("by", "code"), [(RIGHT, 0), (NO_MASK, 0), (LOCAL, 1)])
def test_where_ours_cannot_be_used_the_native_one_counts(by, code):
    found = report({"BatchNormalization()": LOCAL, NATIVE: by})
    assert found.exit_code == code
    if by is NO_MASK:
        assert "synchronizes here, but not with a mask" in found.sentence


def test_plain_layers_alone_are_not_available():
    # On JAX under keras.distribution they are global; they do not claim to synchronize.
    assert report({"BatchNormalization()": RIGHT}).exit_code == 1


def test_a_layer_without_a_measurement_is_not_acquitted():
    trial = Outcome("well", 0, "", [{"layer": {"name": OURS, "role": "ours"}}])
    found = verdict.by_trial(SUBJECT, table.read(), MACHINE, "tensorflow", trial, {}, [])
    assert found.exit_code == 1


@pytest.mark.parametrize("ended", ["timeout", "signal", "error"])
def test_a_trial_that_came_to_no_end_cannot_tell(ended):
    found = report({OURS: RIGHT}, ended=ended, status=9)
    assert found.exit_code == 2
    assert "'the last thing'" in found.sentence


def test_an_error_of_the_settings_is_not_available_though_the_layer_works():
    error = Finding("error", "TF_CONFIG", "It is no JSON.")
    found = report({OURS: RIGHT}, [error, Finding("warning", "keras.json", "…")])
    assert found.exit_code == 1
    assert found.sentence.startswith("Not as it is set up: TF_CONFIG: It is no JSON.")
    assert report({OURS: RIGHT}, [Finding("warning", "a", "b")]).exit_code == 0


def test_nothing_to_try_cannot_tell():
    found = verdict.by_trial(SUBJECT, table.read(), MACHINE, "tensorflow", None, {}, [])
    assert found.exit_code == 2
    assert found.sentence == "Cannot tell: TensorFlow is not installed."
    assert text_of(found).startswith(found.sentence)


def test_the_text_and_the_json_say_the_same():
    found = report({"BatchNormalization()": LOCAL, NATIVE: NO_MASK, OURS: RIGHT})
    text, document = text_of(found), json.loads(json.dumps(found.as_dict()))
    flat = " ".join(text.split())
    assert flat.startswith(document["sentence"])
    assert document["available"] is True
    for layer in document["tried"]:
        (line,) = [line for line in text.splitlines() if line.startswith(f"  {layer['name']} ")]
        right = [case["by"] for case in layer["cases"].values()].count("global")
        assert line.split().count("yes") == right
    for defect in document["defects"]:
        assert " ".join(defect["says"].split()) in flat
        assert all(name in flat for name in defect["reports"])
    assert max(map(len, text.splitlines())) <= 120
