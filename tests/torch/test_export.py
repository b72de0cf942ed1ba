"""A model with the layer is exported as one with Keras's: to the last bit, with no collective."""

import keras
import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests import exported
from tests.exported import X
from tests.harness import numbers
from torch.distributed import _functional_collectives as functional
from torch.testing._internal.distributed.fake_pg import FakeStore


@pytest.fixture(scope="module")
def models():
    """The one with the layer, trained, and the other with Keras's."""
    keras.utils.set_random_seed(0)
    model = exported.trained(exported.synchronized())
    return model, exported.plain(model)


@pytest.fixture
def group():
    """This process as one of two: a collective is recorded, and waits for nobody."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def operations(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def collectives(names):
    return [one for one in names if "c10d" in one or "all_reduce" in one]


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("through", ["torch.export", "model.export"])
def test_the_exported_program_is_keras_s_own(through, models, tmp_path):
    found, names = [], []
    for name, model in zip("ab", models, strict=True):
        if through == "torch.export":
            program = torch.export.export(model, (torch.tensor(X),), strict=False)
        else:
            path = tmp_path / f"{name}.pt2"
            batch = {0: torch.export.Dim("batch", min=1, max=64)}
            model.export(path, format="torch", verbose=False, dynamic_shapes=batch)
            program = torch.export.load(path)
        found.append(numbers(program.module()(torch.tensor(X))))
        names.append(sorted(operations(program)))
    np.testing.assert_array_equal(*found)
    np.testing.assert_allclose(found[0], numbers(models[0](X)), rtol=0, atol=1e-5)
    assert any("conv2d" in one for one in names[0])
    assert not collectives(names[0])


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore")
def test_what_looks_for_collectives_finds_one():
    """The negative control."""

    class Sum(torch.nn.Module):
        def forward(self, x):
            return functional.all_reduce(x, "sum", dist.group.WORLD)

    program = torch.export.export(Sum(), (torch.ones(3),), strict=False)
    assert collectives(operations(program))


@pytest.mark.filterwarnings("ignore")
def test_onnx_too(models, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    found = []
    for name, model in zip("ab", models, strict=True):
        path = str(tmp_path / f"{name}.onnx")
        model(X[:1])  # without which Keras does not export
        model.export(path, format="onnx", verbose=False)
        session = runtime.InferenceSession(path)
        found.append(session.run(None, {session.get_inputs()[0].name: X[:1]})[0])
    np.testing.assert_array_equal(*found)
    np.testing.assert_allclose(found[0], numbers(models[0](X[:1])), rtol=0, atol=1e-5)
