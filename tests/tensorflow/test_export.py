"""A model with the layer serves where there is no syncbn."""

import keras
import numpy as np
import pytest
from tests.processes import python

import syncbn


def test_exported_model_serves_without_syncbn(tmp_path):
    model = keras.Sequential(
        [keras.Input((3, 4)), syncbn.SyncBatchNormalization(name="norm"), keras.layers.Dense(2)]
    )
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(0.5, 2, w.shape) for w in model.get_weights()])
    model.export(str(tmp_path / "export"))
    printed = python(
        "import sys, numpy as np, tensorflow as tf\n"
        f"m = tf.saved_model.load({str(tmp_path / 'export')!r})\n"
        "print(float(tf.reduce_sum(m.serve(np.ones((2, 3, 4), 'float32')))))\n"
        "assert 'syncbn' not in sys.modules"
    )
    expected = float(np.sum(model.predict(np.ones((2, 3, 4), "float32"), verbose=0)))
    assert float(printed) == pytest.approx(expected, rel=1e-5)
