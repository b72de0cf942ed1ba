"""What the doctor reads of this machine without importing a framework."""

import json

import pytest

from syncbn.doctor import machine
from syncbn.doctor.children import Outcome
from syncbn.doctor.trouble import of_devices, of_the_end


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """These packages and no others; and a home without keras.json."""

    def install(**versions):
        names = {name.replace("__", "-"): version for name, version in versions.items()}
        monkeypatch.setattr(machine, "_version", names.get)
        monkeypatch.setattr(machine, "_is_there", lambda _: False)
        return {"KERAS_HOME": str(tmp_path)}

    return install


def findings(environment):
    return {(found.level, found.about) for found in machine.look(environment).findings}


def test_this_machine_is_read_as_it_is():
    keras = pytest.importorskip("keras")
    found = machine.look({})
    assert found.versions["keras"] == keras.__version__
    assert found.versions["syncbn"]
    assert found.versions["tensorflow"].startswith("2.")
    assert found.has("torch")


def test_nothing_at_all(installed):
    found = machine.look(installed())
    assert {*found.versions} == {"python", "syncbn"}
    assert [one.about for one in found.findings] == ["Keras's default"]
    assert "pip install" in found.findings[0].do


@pytest.mark.parametrize(
    ("versions", "variables", "expected"),
    [
        ({"tensorflow": "2.21.0", "keras": "3.15.1"}, {}, set()),
        ({"tensorflow": "2.15.1", "keras": "2.15.0"}, {}, set()),
        ({"tensorflow": "2.15.1", "keras": "3.0.5"}, {}, {("error", "Keras")}),
        ({"tensorflow": "2.16.1", "keras": "2.15.0"}, {}, {("error", "Keras")}),
        (
            {"tensorflow": "2.21.0", "tensorflow__cpu": "2.20.0", "keras": "3.15.1"},
            {},
            {("warning", "TensorFlow")},
        ),
        (
            {"tensorflow": "2.21.0", "tensorflow__cpu": "2.21.0", "keras": "3.15.1"},
            {},
            {("warning", "TensorFlow")},
        ),
        ({"tensorflow": "2.15.0", "tensorflow__intel": "2.15.0"}, {}, set()),
        ({"tensorflow": "2.21.0", "tf_keras": "2.21.0"}, {"TF_USE_LEGACY_KERAS": "1"}, set()),
        (
            {"tensorflow": "2.21.0", "tf_keras": "2.16.0"},
            {"TF_USE_LEGACY_KERAS": "True"},
            {("warning", "tf_keras")},
        ),
        (
            {"tensorflow": "2.21.0", "keras": "3.15.1"},
            {"TF_USE_LEGACY_KERAS": "1"},
            {("error", "TF_USE_LEGACY_KERAS")},
        ),
        (
            {"tensorflow": "2.21.0", "tf_keras": "2.21.0", "jax": "0.10.2"},
            {"TF_USE_LEGACY_KERAS": "1", "KERAS_BACKEND": "jax"},
            {("warning", "TF_USE_LEGACY_KERAS")},
        ),
        ({"tensorflow": "2.14.0"}, {"TF_USE_LEGACY_KERAS": "1"}, {("note", "TF_USE_LEGACY_KERAS")}),
        ({"tensorflow": "2.21.0"}, {"KERAS_BACKEND": "jax"}, {("error", "KERAS_BACKEND")}),
        ({"tensorflow": "2.21.0"}, {"KERAS_BACKEND": "theano"}, {("error", "KERAS_BACKEND")}),
        ({"tensorflow": "2.21.0"}, {"KERAS_BACKEND": "openvino"}, {("error", "KERAS_BACKEND")}),
    ],
)
def test_what_does_not_go_together_is_named(installed, versions, variables, expected):
    assert findings({**installed(**versions), **variables}) == expected


def test_the_backend_in_force_is_kerass_own_choice(installed, tmp_path):
    home = installed(tensorflow="2.21.0", jax="0.10.2", torch="2.13.0")
    assert machine.look(home).backend == "tensorflow"
    (tmp_path / "keras.json").write_text(json.dumps({"backend": "jax"}))
    found = machine.look(home)
    assert (found.backend, found.backend_by) == ("jax", str(tmp_path / "keras.json"))
    found = machine.look({**home, "KERAS_BACKEND": "torch"})
    assert (found.backend, found.backend_by) == ("torch", "KERAS_BACKEND")
    # An empty one is none, as for Keras.
    assert machine.look({**home, "KERAS_BACKEND": ""}).backend == "jax"


@pytest.mark.parametrize(
    ("content", "level"), [("{", "warning"), ("", "warning"), ("[]", "error"), ("{}", None)]
)
def test_a_broken_keras_json_is_spoken_of(installed, tmp_path, content, level):
    """What is no JSON is of no effect in Keras; of a list it dies while it is imported."""
    home = installed(tensorflow="2.21.0")
    (tmp_path / "keras.json").write_text(content)
    found = machine.look(home)
    assert found.backend == "tensorflow"
    assert [(one.level, one.about) for one in found.findings] == (
        [(level, "keras.json")] if level else []
    )


@pytest.mark.parametrize(
    ("ended", "status", "said"),
    [
        ("timeout", 0, "--timeout"),
        ("signal", 4, "newer CPU"),
        ("signal", 9, "memory"),
        ("signal", 11, "--force-reinstall tensorflow"),
        ("error", 1, "--force-reinstall tensorflow"),
    ],
)
def test_every_bad_end_has_an_advice(ended, status, said):
    outcome = Outcome(ended, status, "import tensorflow", complaint=["one", "two"], seconds=3)
    error, note = of_the_end(outcome, "tensorflow")
    assert "'import tensorflow'" in error.says
    assert said in error.do
    assert note.says.endswith("one | two")
    assert of_the_end(Outcome("well", 0, ""), "tensorflow") == []


def test_gpus_that_are_not_used_are_spoken_of(monkeypatch, tmp_path):
    def of(gpus):
        return [(one.level, one.about) for one in of_devices(Outcome("well", 0, "", [gpus]))]

    monkeypatch.setattr("syncbn.doctor.trouble._NVIDIA", tmp_path)
    assert of({"gpus": 0}) == [("warning", "devices")]
    assert of({"gpus": 1}) == [("note", "devices")]
    assert of({"gpus": 2}) == of({}) == []
    monkeypatch.setattr("syncbn.doctor.trouble._NVIDIA", tmp_path / "none")
    assert of({"gpus": 0}) == []
