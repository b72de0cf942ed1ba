"""Digits: large means, many elements, half precision, any place of the channels in memory."""

import numpy as np
import pytest
import torch
from tests.harness import assert_close, assert_equals_one_device, make_case, observe
from tests.replicas.torch import make_layer, tensor

from syncbn._backends.torch.composed import composed
from syncbn._backends.torch.layout import Layout
from syncbn._backends.torch.native import native


@pytest.mark.parametrize("sizes", [(500,), (300, 200)])
@pytest.mark.parametrize(("offset", "tolerance"), [(1e3, 1e-4), (1e4, 1e-3)])
def test_variance_at_a_large_mean(offset, tolerance, sizes):
    case = make_case([(size, 3, 4) for size in sizes], offset=offset)._replace(momentum=0.0)
    observed, expected = observe(case), case.expected()
    assert_close("variance", observed.moving_variances[0], expected.variance, tolerance)
    assert_close("mean", observed.moving_means[0], expected.mean, 1e-7)
    # The mean's rounding is a visible part of a standard deviation; what it lacks is not lost.
    outputs, gradients = (
        np.concatenate([a.ravel() for a in arrays])
        for arrays in (observed.outputs, observed.input_gradients)
    )
    assert_close("outputs", outputs, np.concatenate([e.ravel() for e in expected.outputs]), 2e-6)
    its = np.concatenate([e.ravel() for e in expected.input_gradients])
    assert_close("input gradients", gradients, its, 2e-6)


@pytest.mark.parametrize("shape", [(65537 * 4, 3), (80000, 64), (40, 6, 3136), (100003, 2)])
def test_many_examples(shape):
    axis = 1 if len(shape) == 3 else -1
    case = make_case([shape], axis=axis)
    assert_equals_one_device(case, observe(case), 2e-6)


@pytest.mark.parametrize(
    ("dtype", "policy"),
    [
        *(("float16", "mixed_float16"), ("bfloat16", "mixed_bfloat16")),
        *(("float16", "float16"), ("bfloat16", "bfloat16")),
    ],
)
def test_half_precision_has_statistics_in_float32(dtype, policy):
    case = make_case([(40, 6, 3), (25, 6, 3)], dtype=dtype)
    observed, expected = observe(case, dtype=policy), case.expected()
    rounding = {"float16": 2**-11, "bfloat16": 2**-8}[dtype]
    for name in ("outputs", "input_gradients"):
        for own, its in zip(getattr(observed, name), getattr(expected, name), strict=True):
            assert own.dtype == dtype
            assert_close(name, own, its, 2 * rounding)
    if policy.startswith("mixed"):
        assert observed.moving_means[0].dtype == np.float32
        assert_close("mean", observed.moving_means[0], 0.1 * expected.mean, 2e-6)
        moved = 0.9 + 0.1 * expected.variance
        assert_close("variance", observed.moving_variances[0], moved, 2e-6)


# The order of the axes in memory, of inputs with channels last or on axis 1.
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("memory", [(0, 1, 2, 3), (0, 3, 1, 2), (0, 2, 3, 1), (3, 1, 0, 2)])
def test_any_order_in_memory_gives_the_same_in_that_order(memory, axis):
    case = make_case([(6, 4, 5, 3)], axis=axis)
    inverse = np.argsort(memory)

    def lying(array):
        return tensor(array.transpose(memory)).permute(*inverse.tolist())

    layer = make_layer(case)
    x = lying(case.parts[0]).requires_grad_()
    y = layer(x, training=True)
    y.backward(lying(case.cotangents[0]))
    expected = case.expected()
    assert_close("outputs", y.detach().numpy(), expected.outputs[0], 2e-6)
    assert_close("input gradients", x.grad.numpy(), expected.input_gradients[0], 2e-6)
    assert y.stride() == x.stride()


def test_what_lies_in_order_is_not_copied():
    x = torch.zeros(4, 5, 6, 3)
    for view in (x, x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), x.movedim(0, -1)):
        layout = Layout.of(view)
        assert layout.view(view).data_ptr() == view.data_ptr()
        assert layout.restored(layout.view(view)).stride() == view.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_torch_s_kernels_and_the_elementary_operations_agree(dtype, offset):
    from syncbn._backends.torch.scaling import Correction, Scaling

    x = (torch.randn(33, 6, 5) + offset).to(dtype)
    dy = torch.randn(33, 6, 5).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    results = []
    for kernel in (native, composed):
        moments = kernel.moments(x, None, torch.float64)
        vectors = torch.linspace(0.5, 2, 5, dtype=wide), torch.linspace(-1, 1, 5, dtype=wide)
        scaling = Scaling.of(moments, *vectors, 1e-3)
        sums = kernel.sums(dy, x, None, scaling)
        total = torch.cat([sums.outputs, sums.normalized(scaling)])
        correction = Correction.of(total, moments.count, scaling)
        gradient = kernel.gradient(dy, x, None, scaling, correction)
        outputs = kernel.apply(x, scaling)
        assert gradient.dtype == outputs.dtype == dtype
        results.append((moments.mean, moments.m2, outputs, total, gradient))
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 2e-3}[dtype]
    for own, its in zip(*results, strict=True):
        assert_close("result", own.double().numpy(), its.double().numpy(), tolerance)
