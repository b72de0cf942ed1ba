"""Checkpoints restore models on every backend: of Keras 2, of Keras 3's other class, of torch."""

import json
import struct

import keras
import numpy as np
import pytest
from tests.old_checkpoints import models
from tests.old_checkpoints.unpacked import unpack

from syncbn import SyncBatchNormalization
from syncbn.checkpoints import CheckpointWarning, load_weights
from syncbn.errors import InputError


@pytest.mark.filterwarnings("ignore::syncbn.checkpoints.CheckpointWarning")
def test_old_files_restore_the_model(tmp_path):
    unpack("tf-2.15.1", tmp_path)
    expected = np.load(tmp_path / "expected.npz")
    for kind in ("nested", "subclassed"):
        for file in ("weights_only.h5", "model.weights.h5"):
            model, _ = models.MODELS[kind](keras, SyncBatchNormalization)
            load_weights(model, tmp_path / f"{kind}_{file}")
            outputs = keras.ops.convert_to_numpy(model(expected["inputs"], training=False))
            error = np.abs(outputs - expected[kind]).max() / np.abs(expected[kind]).max()
            assert error < 2e-6, (kind, file)


@pytest.mark.filterwarnings("ignore::syncbn.checkpoints.CheckpointWarning")
def test_files_of_keras_3_with_the_other_class_restore_the_model(tmp_path):
    plain, sync = keras.layers.BatchNormalization, SyncBatchNormalization
    for saved, loaded in ((plain, sync), (sync, plain)):
        one, parts = models.nested(keras, saved)
        models.fill(parts)
        for save, file in ((one.save_weights, "a.weights.h5"), (one.save, "a.keras")):
            save(tmp_path / file)
            other, theirs = models.nested(keras, loaded)
            load_weights(other, tmp_path / file)
            for part, layer in theirs.items():
                for a, b in zip(parts[part].get_weights(), layer.get_weights(), strict=True):
                    assert np.array_equal(a, b)


def torch_like(shapes, seed=0):
    draw = np.random.default_rng(seed)
    return {name: draw.uniform(0.5, 1.5, shape).astype("float32") for name, shape in shapes.items()}


STATE = {
    **{"conv.weight": (4, 3, 2, 5), "conv.bias": (4,), "bn.weight": (4,), "bn.bias": (4,)},
    **{"bn.running_mean": (4,), "bn.running_var": (4,), "bn.num_batches_tracked": ()},
    **{"depth.weight": (8, 1, 3, 2), "up.weight": (8, 2, 3, 2), "fc.weight": (6, 2)},
}
NAMES = {"conv": "conv", "bn": "bn", "depth": "depth.", "up": "up", "fc": "fc"}


def torch_net(momentum=0.9):
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((9, 9, 3)),
            layers.Conv2D(4, (2, 5), name="conv"),
            SyncBatchNormalization(momentum=momentum, epsilon=1e-5, name="bn"),
            layers.DepthwiseConv2D((3, 2), depth_multiplier=2, use_bias=False, name="depth"),
            layers.Conv2DTranspose(2, (3, 2), use_bias=False, name="up"),
            layers.Dense(6, use_bias=False, name="fc"),
        ]
    )


def by_definition(state, x):
    """What torch's modules compute, by their sums: NHWC inputs, no framework."""
    p = {name: value.astype("float64") for name, value in state.items()}
    windows = np.lib.stride_tricks.sliding_window_view
    x = np.moveaxis(x.astype("float64"), -1, 1)
    x = np.einsum("nchwij,ocij->nohw", windows(x, (2, 5), (2, 3)), p["conv.weight"])
    column = (slice(None), None, None)
    x = x + p["conv.bias"][column]
    x = (x - p["bn.running_mean"][column]) / np.sqrt(p["bn.running_var"][column] + 1e-5)
    x = x * p["bn.weight"][column] + p["bn.bias"][column]
    x = np.repeat(x, 2, axis=1)
    x = np.einsum("nchwij,cij->nchw", windows(x, (3, 2), (2, 3)), p["depth.weight"][:, 0])
    up = np.zeros((x.shape[0], 2, x.shape[2] + 2, x.shape[3] + 1))
    for i in range(3):
        for j in range(2):
            part = np.einsum("nchw,co->nohw", x, p["up.weight"][:, :, i, j])
            up[:, :, i : i + x.shape[2], j : j + x.shape[3]] += part
    return np.einsum("nchw,oc->nhwo", up, p["fc.weight"])


def test_a_whole_net_of_torch_moves(tmp_path):
    state = torch_like(STATE)
    model = torch_net()
    report = load_weights(model, {"epoch": 3, "state_dict": state}, names=NAMES)
    assert report.left_out == ("epoch",)
    assert "unbiased" in report.notes[0]
    x = np.random.default_rng(1).normal(size=(2, 9, 9, 3)).astype("float32")
    outputs = keras.ops.convert_to_numpy(model(x, training=False))
    expected = by_definition(state, x)
    assert np.abs(outputs - expected).max() < 1e-5 * np.abs(expected).max()
    other = torch_net()
    path = tmp_path / "net.safetensors"
    write_safetensors(path, state)
    load_weights(other, path, names=NAMES)
    for a, b in zip(model.get_weights(), other.get_weights(), strict=True):
        assert np.array_equal(a, b)


def write_safetensors(path, state):
    header, data = {}, b""
    for name, array in state.items():
        start, data = len(data), data + array.tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(array.shape),
            "data_offsets": [start, len(data)],
        }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_the_average_of_all_batches_goes_on_counting_where_torch_was():
    state = torch_like(STATE) | {"bn.num_batches_tracked": np.array(7)}
    model = torch_net(momentum=None)
    load_weights(model, state, names=NAMES)
    assert int(model.get_layer("bn").num_batches_tracked) == 7


def test_what_of_torch_does_not_fit_is_one_error_and_changes_nothing():
    model = torch_net()
    before = model.get_weights()
    state = torch_like(STATE | {"bn.running_var": (5,)})
    with pytest.raises(InputError, match=r"1 that do not fit: bn\.running_var of shape"):
        load_weights(model, state, names=NAMES)
    with pytest.raises(InputError, match="fc, which `names` gives no prefix for"):
        load_weights(model, torch_like(STATE), names={"conv": "conv", "bn": "bn"})
    with pytest.raises(InputError, match=r"head\.weight for fc/kernel, not in the file"):
        load_weights(model, torch_like(STATE), names=NAMES | {"fc": "head"})
    for a, b in zip(before, model.get_weights(), strict=True):
        assert np.array_equal(a, b)


def test_the_default_epsilon_of_keras_is_warned_of():
    model = keras.Sequential([keras.Input((4,)), SyncBatchNormalization(name="bn")])
    state = torch_like({name: shape for name, shape in STATE.items() if name.startswith("bn.")})
    with pytest.warns(CheckpointWarning, match="1 layers have Keras's default epsilon of 0.001"):
        load_weights(model, state, names={"bn": "bn"})
