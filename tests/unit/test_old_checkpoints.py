"""Checkpoints that TensorFlow 2.2 to 2.15 and tf_keras have written load into models of today."""

import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from tests.old_checkpoints import models
from tests.old_checkpoints.unpacked import unpack

from syncbn import SyncBatchNormalization
from syncbn.checkpoints import CheckpointWarning, load_weights
from syncbn.errors import InputError

FIXTURES = Path(models.__file__).parent
ARCHIVES = sorted(path.name.removesuffix(".tar.xz") for path in FIXTURES.glob("*.tar.xz"))
WITHOUT_FLAG = {"tf-2.2.3", "tf-2.5.3", "tf-2.8.4", "tf-2.11.1"}

pytestmark = pytest.mark.filterwarnings("ignore::syncbn.checkpoints.CheckpointWarning")


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory):
    """The folder with the files of a version."""
    folders = {}

    def unpacked(version):
        if version not in folders:
            folders[version] = tmp_path_factory.mktemp(version)
            unpack(version, folders[version])
        return folders[version]

    return unpacked


def checkpoints(folder, kind):
    """The path of each checkpoint of a kind of model, as a user would name it."""
    names = {path.name.split(".data-")[0] for path in folder.glob(f"{kind}_*")}
    return sorted(folder / name.removesuffix(".index") for name in names)


def made(kind, norm=SyncBatchNormalization, session=1):
    """The model as today's code makes it, late in a session: its names have other numbers."""
    for _ in range(session):
        norm(), keras.layers.Conv2D(1, 1), keras.layers.Dense(1)
    return models.MODELS[kind](keras, norm)


def wrong_weights(parts):
    """Those that are not what the fixtures have, bit for bit."""
    return [
        f"{part}/{models.leaf(weight)}"
        for part, layer in parts.items()
        for weight in layer.weights
        if not np.array_equal(
            weight.numpy(), models.values(part, models.leaf(weight), tuple(weight.shape))
        )
    ]


def state_of(model):
    return [weight.numpy().copy() for weight in model.weights]


def unchanged(model, before):
    return all(np.array_equal(a, b.numpy()) for a, b in zip(before, model.weights, strict=True))


@pytest.mark.parametrize("version", ARCHIVES)
@pytest.mark.parametrize("kind", models.MODELS)
def test_every_file_of_every_version_restores_the_model(fixtures, version, kind):
    folder = fixtures(version)
    expected = np.load(folder / "expected.npz")
    if kind not in expected:
        assert kind == "flag"
        assert version in WITHOUT_FLAG
        return
    paths = checkpoints(folder, kind)
    assert len(paths) + sum(name.startswith(kind) for name in expected["refused"]) >= 6
    model, parts = made(kind)
    for path in paths:
        for weight in model.weights:
            weight.assign(np.full(weight.shape, np.nan))
        report = load_weights(model, path)
        assert wrong_weights(parts) == [], path
        assert len(report.restored) == len(parts)
        outputs = model(expected["inputs"], training=False).numpy()
        error = np.abs(outputs - expected[kind]).max() / np.abs(expected[kind]).max()
        assert error < 1e-6, path


@pytest.mark.parametrize("kind", models.MODELS)
def test_the_class_in_the_model_may_be_the_other(fixtures, kind):
    model, parts = made(kind, keras.layers.BatchNormalization)
    for path in checkpoints(fixtures("tf-2.15.1"), kind):
        model.set_weights([np.zeros(weight.shape) for weight in model.weights])
        load_weights(model, path)
        assert wrong_weights(parts) == [], path


class FreezableSyncBatchNorm(SyncBatchNormalization):
    """As projects have it, of the same weights."""


@pytest.mark.parametrize("file", ["functional_model.keras", "functional_model.weights.h5"])
def test_the_class_in_the_model_may_be_a_subclass(fixtures, file):
    model, parts = made("functional", FreezableSyncBatchNorm)
    load_weights(model, fixtures("tf-2.15.1") / file)
    assert wrong_weights(parts) == []


def test_slots_of_the_optimizer_are_named_in_the_report(fixtures):
    folder = fixtures("tf-2.15.1")
    model, _ = made("functional")
    for file in ("whole.h5", "model.keras", "train.ckpt-1"):
        left = load_weights(model, folder / f"functional_{file}").left_out
        assert any(text.startswith("optimizer") for text in left), (file, left)
    report = load_weights(model, folder / "functional_whole.h5")
    assert report.keras_version == "2.15.0"
    assert "optimizer_weights: 15 arrays" in report.summary()


@pytest.mark.parametrize("file", ["whole.h5", "model.keras", "weights_only.h5", "weights.ckpt"])
def test_a_flag_that_keras_2_lost_is_said_once(fixtures, file):
    model, _ = made("flag", keras.layers.BatchNormalization)
    path = fixtures("tf-2.15.1") / f"flag_{file}"
    with pytest.warns(CheckpointWarning, match=r"cannot tell whether 3 .* 0 synchronize") as caught:
        report = load_weights(model, path)
    assert len(caught) == 1
    assert str(caught[0].message) == report.notes[0]


@pytest.mark.filterwarnings("error")
def test_the_old_class_says_that_it_synchronized(fixtures):
    folder = fixtures("tf-2.15.1")
    for file in ("whole.h5", "model.keras", "model.weights.h5", "weights.ckpt"):
        report = load_weights(made("functional")[0], folder / f"functional_{file}")
        assert report.notes == ("3 layers were synchronized in the program that saved them.",)
        plain = made("functional", keras.layers.BatchNormalization)[0]
        with pytest.warns(CheckpointWarning, match=r"3 layers were synchronized .* are not"):
            load_weights(plain, folder / f"functional_{file}")


def test_another_epsilon_than_the_files_is_said(fixtures):
    model, _ = made("functional", lambda: SyncBatchNormalization(epsilon=1e-5))
    with pytest.warns(CheckpointWarning, match="In 3 layers epsilon was 0.001, is 1e-05"):
        load_weights(model, fixtures("tf-2.15.1") / "functional_whole.h5")


@pytest.mark.parametrize("file", ["whole.h5", "model.keras", "model.weights.h5", "weights.ckpt"])
def test_a_model_of_another_shape_is_one_error_and_changes_nothing(fixtures, file):
    inputs = keras.Input(models.SIZE)
    x = SyncBatchNormalization()(keras.layers.Conv2D(3, 2)(inputs))
    x = SyncBatchNormalization()(keras.layers.Conv2D(4, 1)(x))
    x = SyncBatchNormalization()(keras.layers.Conv2D(3, 1)(x))
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    before = state_of(model)
    with pytest.raises(InputError, match=r"that do not fit: .*\(.*3.* for .*4") as error:
        load_weights(model, fixtures("tf-2.15.1") / f"functional_{file}")
    assert "Nothing was loaded" in str(error.value)
    assert unchanged(model, before)


@pytest.mark.parametrize("file", ["whole.h5", "model.keras", "model.weights.h5", "weights.ckpt"])
def test_a_layer_too_many_on_either_side_is_named(fixtures, file):
    path = fixtures("tf-2.15.1") / f"functional_{file}"
    model, parts = made("functional")
    more = keras.Model(model.inputs, keras.layers.Dense(2, name="extra")(model.outputs[0]))
    with pytest.raises(InputError, match="extra, in the model alone"):
        load_weights(more, path)
    fewer = keras.Model(model.inputs, parts["left_norm"].output)
    with pytest.raises(InputError, match=r"(head|dense|weights-6).*, in the file alone"):
        load_weights(fewer, path)


def swapped():
    """The functional model with its two branches created in the other order."""
    layers = keras.layers
    parts = {"right": layers.Conv2D(3, 1), "right_norm": SyncBatchNormalization()}
    parts |= {"left": layers.Conv2D(3, 1), "left_norm": SyncBatchNormalization()}
    parts |= {"stem": layers.Conv2D(3, 2, padding="same"), "stem_norm": SyncBatchNormalization()}
    inputs = keras.Input(models.SIZE)
    x = layers.ReLU()(parts["stem_norm"](parts["stem"](inputs)))
    left = layers.ReLU()(parts["left_norm"](parts["left"](x)))
    right = parts["right_norm"](parts["right"](x))
    x = layers.GlobalAveragePooling2D()(layers.Subtract()([right, left]))
    parts["head"] = layers.Dense(2, name="head")
    return keras.Model(inputs, parts["head"](x)), parts


@pytest.mark.parametrize("file", ["whole.h5", "model.keras", "weights.ckpt"])
def test_two_ways_that_differ_are_an_error_until_one_is_chosen(fixtures, file):
    path = fixtures("tf-2.15.1") / f"functional_{file}"
    model, parts = swapped()
    before = state_of(model)
    with pytest.raises(InputError, match=r"can be told apart.*differ in") as error:
        # The stem has another shape than the branches, which alone fit both ways.
        load_weights(model, path, names=names_of(parts, "stem", "stem_norm"))
    assert unchanged(model, before)
    assert 'by="place"' in str(error.value)
    load_weights(model, path, names=names_of(parts, "stem", "stem_norm"), by="place")
    assert wrong_weights(parts) == []


def names_of(parts, *wanted):
    """What the layers are in a file of the functional model: its session began with two of each."""
    theirs = {"stem": "conv2d_2", "stem_norm": "sync_batch_normalization_2"}
    return {parts[part].name: theirs[part] for part in wanted}


def test_layers_can_be_named_and_a_part_be_loaded(fixtures):
    path = fixtures("tf-2.15.1") / "functional_whole.h5"
    model, parts = made("functional")
    before = state_of(model)
    report = load_weights(model, path, names={"head": "head"}, partial=True)
    assert [one.layer for one in report.restored] == ["head"]
    assert len(report.untouched) == 6
    assert wrong_weights({"head": parts["head"]}) == []
    assert np.array_equal(before[0], model.weights[0].numpy())
    with pytest.raises(InputError, match="'head' is 1 layers of the model, 'tail' 0"):
        load_weights(model, path, names={"head": "tail"})


def test_a_checkpoint_of_two_models_asks_which(tmp_path):
    import tensorflow as tf

    one, two = (keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]) for _ in "ab")
    tree = tf.Module()
    for name, value in (("ema", 1.0), ("net", 2.0)):
        branch, dense = tf.Module(), tf.Module()
        dense.kernel, dense.bias = tf.Variable([[value], [value]]), tf.Variable([value])
        setattr(branch, "layer_with_weights-0", dense)
        setattr(tree, name, branch)
    path = tf.train.Checkpoint(ema=tree.ema, net=tree.net).save(tmp_path / "both")
    with pytest.raises(InputError, match=r"\['ema', 'net'\], which all do"):
        load_weights(one, path)
    load_weights(one, path, part="net")
    assert one.weights[0].numpy().tolist() == [[2.0], [2.0]]
    with pytest.raises(InputError, match=r"There are: .*'ema'"):
        load_weights(two, path, part="model")
    # The folder stands for its latest checkpoint.
    load_weights(two, tmp_path, part="ema")
    assert two.weights[1].numpy().tolist() == [1.0]


def test_nothing_outside_of_the_file_is_read(tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["0"], file["1"] = np.ones((2, 1)), np.ones(1)
    with h5py.File(tmp_path / "linked.weights.h5", "w") as file:
        file.create_group("layers/dense")["vars"] = h5py.ExternalLink("secret.h5", "/")
    with pytest.raises(InputError, match="a link to another file"):
        load_weights(model, tmp_path / "linked.weights.h5")
    with zipfile.ZipFile(tmp_path / "pickled.keras", "w") as archive:
        archive.writestr("model.weights.npz", b"pickle")
    with pytest.raises(InputError, match=r"pickles, which are not loaded"):
        load_weights(model, tmp_path / "pickled.keras")


def test_what_is_no_checkpoint_and_no_model_is_refused(tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    with pytest.raises(FileNotFoundError, match="where nothing is"):
        load_weights(model, tmp_path / "absent.h5")
    (tmp_path / "text.h5").write_text("no")
    with pytest.raises(InputError, match="none by its content"):
        load_weights(model, tmp_path / "text.h5")
    unbuilt = keras.Sequential([keras.layers.Dense(1)])
    with pytest.raises(InputError, match="a built model"):
        load_weights(unbuilt, tmp_path / "text.h5")
    with pytest.raises(InputError, match="a Keras 3 model"):
        load_weights(keras.layers.Dense(1), tmp_path / "text.h5")
    with pytest.raises(InputError, match='"place", "name" or None'):
        load_weights(model, tmp_path / "text.h5", by="order")
    with pytest.raises(InputError, match="partial=True requires"):
        load_weights(model, tmp_path / "text.h5", partial=True)
