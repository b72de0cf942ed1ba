"""`syncbn convert`: models in files."""

import json
import os
from pathlib import Path

import keras
import numpy as np
import pytest
from tests.processes import python

import syncbn
from syncbn.cli import main

# Keras warns of its older format, which is asked for here.
pytestmark = pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A trained model, one with a Lambda layer, one of a class that nobody knows."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    norm = keras.layers.BatchNormalization(name="norm")
    model = keras.Sequential([keras.Input((3,)), norm, keras.layers.Dense(1)], name="net")
    model.compile("adam", "mse")
    x, y = rng.normal(size=(16, 3)), rng.normal(size=(16, 1))
    model.fit(x, y, verbose=0)
    code = keras.Sequential(
        [keras.Input((3,)), keras.layers.Lambda(lambda x: x * 2), keras.layers.BatchNormalization()]
    )
    untrained = keras.Sequential([keras.Input((3,)), *model.layers], name="net")
    for suffix in (".keras", ".h5"):
        untrained.save(folder / f"plain{suffix}")
        code.save(folder / f"code{suffix}")
    model.save(folder / "trained.keras")
    (folder / "other.keras").write_bytes(b"no archive at all")
    return folder


def convert(*arguments):
    """The exit code of the command."""
    try:
        return main(["convert", *map(str, arguments)])
    except SystemExit as error:
        return error.code


def test_a_file_is_converted_and_reverted_with_its_training_and_its_weights(
    files, tmp_path, capsys
):
    there, back = tmp_path / "there.keras", tmp_path / "back.keras"
    assert convert(files / "trained.keras", there, "--set", "group_size=1") == 0
    assert capsys.readouterr().out == "net: 1 layer -> SyncBatchNormalization.\n"
    assert convert(there, back, "--revert") == 0
    assert capsys.readouterr().out == (
        "net: 1 layer -> BatchNormalization, without their group_size.\n"
    )
    models = [keras.saving.load_model(path) for path in (files / "trained.keras", there, back)]
    assert [type(model.layers[0]) for model in models] == [
        keras.layers.BatchNormalization,
        syncbn.SyncBatchNormalization,
        keras.layers.BatchNormalization,
    ]
    assert models[1].layers[0].group_size == 1
    variables = [[*model.weights, *model.optimizer.variables] for model in models]
    for each in zip(*variables, strict=True):
        assert len({np.asarray(v).tobytes() for v in each}) == 1
    assert int(models[2].optimizer.iterations) == 1
    # The mode of any new file, and nothing beside it.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.keras", "there.keras"]
    (tmp_path / "any").touch()
    assert there.stat().st_mode == (tmp_path / "any").stat().st_mode


def test_the_old_format_is_read_and_written(files, tmp_path):
    path = tmp_path / "model.h5"
    assert convert(files / "plain.h5", path) == 0
    model = keras.saving.load_model(path)
    assert type(model.layers[0]) is syncbn.SyncBatchNormalization
    plain = keras.saving.load_model(files / "plain.h5")
    for own, its in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(own, its)


def test_a_plan_is_printed_and_nothing_written(files, capsys):
    before = {path: path.read_bytes() for path in files.iterdir()}
    assert convert(files / "plain.keras", "--plan") == 0
    assert capsys.readouterr().out.splitlines() == [
        "norm  BatchNormalization -> SyncBatchNormalization",
        "net: 1 layer -> SyncBatchNormalization.",
    ]
    assert convert(files / "plain.keras", "--plan", "--json", "--set", "save=output") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["replaced"][0]["arguments"] == {"save": "output"}
    assert {path: path.read_bytes() for path in files.iterdir()} == before


@pytest.mark.parametrize("name", ["code.keras", "code.h5"])
def test_code_in_a_file_is_refused_unless_asked_for(files, tmp_path, capsys, name):
    path = tmp_path / "out.keras"
    assert convert(files / name, path) == 2
    said = capsys.readouterr().err
    assert "without code of its own" in said
    assert "--unsafe" in said
    assert not path.exists()
    assert convert(files / name, path, "--unsafe") == 0
    model = keras.saving.load_model(path, safe_mode=False)
    np.testing.assert_allclose(model(np.ones((1, 3))), 2.0, rtol=1e-3)


EVIL = """
import pathlib
pathlib.Path("imported").touch()
"""


def test_a_file_that_names_a_module_does_not_import_it(tmp_path):
    """Keras would import whatever the configuration names, and run it by that."""
    (tmp_path / "evil.py").write_text(EVIL)
    norm = {"class_name": "Norm", "module": "evil", "registered_name": "Norm", "config": {}}
    code = f"""
import json, keras, zipfile
keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()]).save("model.keras")
with zipfile.ZipFile("model.keras") as given, zipfile.ZipFile("evil.keras", "w") as evil:
    for name in given.namelist():
        content = given.read(name)
        if name == "config.json":
            config = json.loads(content)
            config["config"]["layers"][1] = {norm!r}
            content = json.dumps(config)
        evil.writestr(name, content)
import sys
from syncbn.cli import main
sys.stderr = sys.stdout
print(main(["convert", "evil.keras", "out.keras"]), main(["convert", "evil.keras", "--plan"]))
"""
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        said = python(f"import sys; sys.path.insert(0, '.'){code}")
    finally:
        os.chdir(before)
    assert said.endswith("2 2\n")
    assert said.count("the module 'evil', which Keras would import") == 2
    assert not (tmp_path / "imported").exists()
    assert not (tmp_path / "out.keras").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plain.keras"], "requires OUT, or --plan"),
        (["plain.keras", "free.keras", "--plan"], "Received: both"),
        (["missing.keras", "free.keras"], "which is not there"),
        (["other.keras", "free.keras"], "can open by itself"),
        (["plain.keras", "free.txt"], "ends in .keras or .h5"),
        (["plain.keras", "free.weights.h5"], "ends in .keras or .h5"),
        (["plain.keras", "nowhere/free.keras"], "a folder that is there"),
        (["plain.keras", "trained.keras"], "pass --force"),
        (["plain.keras", "free.keras", "--set", "group_size"], "--set requires NAME=VALUE"),
        (["plain.keras", "free.keras", "--set", "scale=false"], "Received: scale=False"),
        (["plain.keras", "free.keras", "--set", "group_size=0"], "an integer of at least 1"),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_changes_nothing(
    files, monkeypatch, capsys, arguments, words
):
    monkeypatch.chdir(files)
    before = {path: path.read_bytes() for path in files.iterdir()}
    assert convert(*arguments) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert {path: path.read_bytes() for path in files.iterdir()} == before


def test_a_file_is_replaced_when_asked_and_kept_when_writing_fails(
    files, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "model.keras"
    path.write_bytes((files / "plain.keras").read_bytes())
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(keras.Model, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        assert convert(path, path, "--force") == 2
    assert "disk full" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    assert convert(path, path, "--force") == 0
    assert type(keras.saving.load_model(path).layers[0]) is syncbn.SyncBatchNormalization


def test_what_its_file_does_not_give_back_is_not_written(files, tmp_path, monkeypatch, capsys):
    """As where a layer of one's own makes plain layers again."""
    original = keras.saving.load_model

    def another(path, **options):
        model = original(path, **options)
        if path.name.startswith("."):
            model.layers[0].gamma.assign([5.0, 5.0, 5.0])
        return model

    monkeypatch.setattr(keras.saving, "load_model", another)
    assert convert(files / "plain.keras", tmp_path / "out.keras") == 2
    assert "that its file gives back" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
