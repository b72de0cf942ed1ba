"""The old name of the layer: an AttributeError before, the layer while installed, and after not."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tests.processes import python
from tests.unit.test_old_checkpoints import fixtures  # noqa: F401

from syncbn import SyncBatchNormalization, compat
from syncbn.errors import RepairError


@pytest.fixture(autouse=True)
def _uninstalled():
    yield
    compat.uninstall()


# As reported of the TF Object Detection API, which subclasses the old name on import.
SNIPPET = """
class FreezableSyncBatchNorm(tf.keras.layers.experimental.SyncBatchNormalization):
    def __init__(self, training=None, **kwargs):
        super().__init__(**kwargs)
        self._training = training

    def call(self, inputs, training=None):
        if self._training is False:
            training = self._training
        return super().call(inputs=inputs, training=training)
"""


def test_the_reported_error_is_there_before_and_after_and_not_between():
    for _ in range(2):
        with pytest.raises(AttributeError, match="has no attribute 'experimental'"):
            exec(SNIPPET, {"tf": tf})
        with compat.install():
            names = {"tf": tf}
            exec(SNIPPET, names)
            assert tf.keras.layers.experimental.SyncBatchNormalization is SyncBatchNormalization
            assert keras.layers.experimental.SyncBatchNormalization is SyncBatchNormalization
            layer = names["FreezableSyncBatchNorm"](momentum=0.9, name="bn")
            outputs = layer(np.arange(6, dtype="float32").reshape(3, 2), training=True)
            assert np.allclose(np.mean(outputs, axis=0), 0, atol=1e-6)
            assert np.allclose(layer.moving_mean, [0.2, 0.3])


def test_every_import_of_the_old_name_works_in_a_process_of_its_own():
    code = """
import sys
from syncbn import compat
names = {*sys.modules}
compat.install()
from keras.layers.experimental import SyncBatchNormalization as one
from tensorflow.keras.layers.experimental import SyncBatchNormalization as two
import tensorflow as tf
from tensorflow.keras.layers import experimental
assert one is two is experimental.SyncBatchNormalization
assert one is tf.keras.layers.experimental.SyncBatchNormalization
compat.uninstall()
assert not [name for name in sys.modules if name.endswith('layers.experimental')]
for layers in (tf.keras.layers, sys.modules['keras.layers']):
    assert not hasattr(layers, 'experimental')
"""
    python(code, KERAS_BACKEND="tensorflow")


def test_install_is_idempotent_and_uninstall_takes_everything_away():
    before = {*vars(keras.layers)}, dict(keras.saving.get_custom_objects())
    first = compat.install()
    assert compat.install() is first
    with compat.install():
        pass
    # It was there before the block was entered.
    assert hasattr(keras.layers, "experimental")
    compat.uninstall()
    compat.uninstall()
    assert ({*vars(keras.layers)}, dict(keras.saving.get_custom_objects())) == before


def test_another_object_of_the_name_is_not_overwritten(monkeypatch):
    class Other:
        SyncBatchNormalization = int

    monkeypatch.setattr(keras.layers, "experimental", Other, raising=False)
    with pytest.raises(RepairError, match=r"another object of this name in keras\.layers"):
        compat.install()
    assert Other.SyncBatchNormalization is int
    assert not hasattr(tf.keras.layers, "experimental")


def test_a_module_that_was_there_gets_the_name_and_keeps_the_rest(monkeypatch):
    import types

    experimental = types.ModuleType("experimental")
    experimental.preprocessing = 1
    monkeypatch.setattr(keras.layers, "experimental", experimental, raising=False)
    with compat.install():
        assert experimental.SyncBatchNormalization is SyncBatchNormalization
    assert vars(experimental).keys() >= {"preprocessing"}
    assert not hasattr(experimental, "SyncBatchNormalization")
    assert keras.layers.experimental is experimental


@pytest.mark.parametrize("version", ["tf-2.2.3", "tf-2.15.1", "tf_keras-2.21.0"])
def test_a_whole_old_model_is_made_from_its_hdf5(fixtures, version):  # noqa: F811
    folder = fixtures(version)
    path = folder / "functional_whole.h5"
    with pytest.raises(ValueError, match="Unknown layer: 'SyncBatchNormalization'"):
        keras.models.load_model(path, compile=False)
    with compat.install():
        model = keras.models.load_model(path, compile=False)
    assert sum(type(layer) is SyncBatchNormalization for layer in model.layers) == 3
    expected = np.load(folder / "expected.npz")
    outputs = model([expected["inputs"]], training=False).numpy()
    assert np.abs(outputs - expected["functional"]).max() < 1e-6 * np.abs(outputs).max()
