"""A model with the layer is exported as one with Keras's: to the last bit, with no collective."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2
from tests import exported
from tests.exported import X
from tests.graphs import is_collective, operations_in
from tests.processes import python
from tests.replicas.tensorflow import strategy_for

import syncbn


@pytest.fixture(scope="module")
def models():
    """The one with the layer, trained on two replicas; the other with Keras's."""
    keras.utils.set_random_seed(0)
    with strategy_for(2).scope():
        model = exported.trained(exported.synchronized())
    return model, exported.plain(model)


def of_saved_model(folder):
    """What its endpoint gives, and every operation in its graphs."""
    file = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    operations = [one for graph in file.meta_graphs for one in operations_in(graph.graph_def)]
    loaded = tf.saved_model.load(str(folder))
    found = loaded.signatures["serving_default"](tf.constant(X))
    return next(iter(found.values())).numpy(), operations


def export(model, folder):
    model.export(str(folder), verbose=False)
    return of_saved_model(folder)


def save(model, folder):
    tf.saved_model.save(model, str(folder))
    return of_saved_model(folder)


def of_tflite(content):
    interpreter = tf.lite.Interpreter(model_content=content)
    (one,), (other,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.resize_tensor_input(one["index"], X.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(one["index"], X)
    interpreter.invoke()
    operations = [each["op_name"] for each in interpreter._get_ops_details()]
    return interpreter.get_tensor(other["index"]), operations


def tflite_from_model(model, _):
    return of_tflite(tf.lite.TFLiteConverter.from_keras_model(model).convert())


def tflite_from_saved_model(model, folder):
    model.export(str(folder), verbose=False)
    return of_tflite(tf.lite.TFLiteConverter.from_saved_model(str(folder)).convert())


def litert(model, folder):
    path = folder.with_suffix(".tflite")
    model.export(str(path), format="litert", verbose=False)
    return of_tflite(path.read_bytes())


def onnx(model, folder):
    pytest.importorskip("tf2onnx")
    runtime = pytest.importorskip("onnxruntime")
    reader = pytest.importorskip("onnx")
    path = str(folder.with_suffix(".onnx"))
    model.export(path, format="onnx", verbose=False)
    session = runtime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: X})
    return found, [node.op_type for node in reader.load(path).graph.node]


FORMATS = [export, save, tflite_from_model, tflite_from_saved_model, litert, onnx]


@pytest.mark.filterwarnings("ignore")  # the converters' own
@pytest.mark.parametrize("through", FORMATS, ids=lambda one: one.__name__)
def test_a_model_trained_on_replicas_is_exported_as_keras_s_own(through, models, tmp_path):
    own, its = (through(model, tmp_path / name) for model, name in zip(models, "ab", strict=True))
    np.testing.assert_array_equal(own[0], its[0])
    expected = models[0](X, training=False).numpy()
    np.testing.assert_allclose(own[0], expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    assert len(own[1]) > 3
    if through is not save:  # which keeps the optimizer too, of the one that was trained
        assert sorted(own[1]) == sorted(its[1])  # not an operation more
    assert not [one for one in own[1] if is_collective(one)]


def test_what_looks_for_collectives_in_a_saved_model_finds_those_of_training():
    """The negative control: a SavedModel that trains has them."""
    strategy = strategy_for(2)
    with strategy.scope():
        layer = syncbn.SyncBatchNormalization()
        layer.build((None, 4))

    def step(training):
        def function(x):
            results = strategy.run(lambda part: layer(part, training=training), args=(x,))
            return strategy.experimental_local_results(results)

        return function

    for training in (False, True):
        function = tf.function(step(training), input_signature=[tf.TensorSpec((None, 4))])
        graph = function.get_concrete_function().graph.as_graph_def()
        file = saved_model_pb2.SavedModel()
        file.meta_graphs.add().graph_def.CopyFrom(graph)
        content = file.SerializeToString()
        read = saved_model_pb2.SavedModel.FromString(content).meta_graphs[0].graph_def
        assert any(is_collective(one) for one in operations_in(read)) is training


def test_exported_model_serves_without_syncbn(models, tmp_path):
    models[0].export(str(tmp_path / "export"), verbose=False)
    printed = python(
        "import sys, numpy as np, tensorflow as tf\n"
        f"m = tf.saved_model.load({str(tmp_path / 'export')!r})\n"
        "print(float(tf.reduce_sum(m.serve(np.ones((2, 6, 6, 3), 'float32')))))\n"
        "assert 'syncbn' not in sys.modules"
    )
    expected = float(np.sum(models[0](np.ones((2, 6, 6, 3), "float32"), training=False)))
    assert float(printed) == pytest.approx(expected, rel=1e-5)
