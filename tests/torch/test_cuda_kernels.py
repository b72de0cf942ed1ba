"""The kernels for CUDA, wired to stand-ins: no GPU has run them.

The four operations are those that `torch.nn.modules._functions.SyncBatchNorm` calls; what each
returns is written out here from how it is used there.
"""

import inspect

import pytest
import torch
from tests.harness import assert_equals_one_device, make_case, observe
from torch.nn.modules import _functions

from syncbn._backends.torch import kernels
from syncbn._backends.torch.cuda import cuda


def _vectors(x, *vectors):
    return [v.view(1, -1, *(1,) * (x.dim() - 2)) for v in vectors]


def _sum(x):
    return x.sum(dim=[d for d in range(x.dim()) if d != 1])


def batch_norm_stats(x, eps):
    mean = _sum(x) / (x.numel() // x.shape[1])
    variance = _sum((x - _vectors(x, mean)[0]).square()) / (x.numel() // x.shape[1])
    inverse = torch.rsqrt(variance + eps)
    # As the kernel has it: no infinity for a constant.
    return mean, torch.where((variance != 0) | (eps != 0), inverse, torch.zeros_like(inverse))


def batch_norm_elemt(x, weight, bias, mean, invstd, eps):  # noqa: ARG001
    weight, bias, mean, invstd = _vectors(x, weight, bias, mean, invstd)
    return (x - mean) * invstd * weight + bias


def batch_norm_backward_reduce(dy, x, mean, invstd, weight, input_g, weight_g, bias_g):  # noqa: ARG001
    assert dy.is_contiguous()
    assert x.is_contiguous()
    sum_dy, sum_dy_xmu = _sum(dy), _sum(dy * (x - _vectors(x, mean)[0]))
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy


def batch_norm_backward_elemt(dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count):
    assert count.dtype == torch.int32
    n = count.sum()
    mean, invstd, weight, sum_dy, sum_dy_xmu = _vectors(x, mean, invstd, weight, sum_dy, sum_dy_xmu)
    return (dy - sum_dy / n - (x - mean) * invstd**2 * sum_dy_xmu / n) * invstd * weight


STAND_INS = (
    batch_norm_stats,
    batch_norm_elemt,
    batch_norm_backward_reduce,
    batch_norm_backward_elemt,
)


@pytest.fixture
def _on_cuda(monkeypatch):
    for stand_in in STAND_INS:
        monkeypatch.setattr(torch, stand_in.__name__, stand_in)
    monkeypatch.setattr(kernels, "_BY_DEVICE", {"cpu": cuda})


@pytest.mark.usefixtures("_on_cuda")
@pytest.mark.parametrize("options", [{}, {"activation": "silu"}, {"save": "output"}], ids=str)
@pytest.mark.parametrize(("shape", "axis"), [((9, 3, 4, 5), -1), ((9, 5, 3, 4), 1), ((30, 5), -1)])
def test_it_gives_what_one_device_gives(shape, axis, options):
    case = make_case([shape], axis=axis)._replace(options=options)
    assert_equals_one_device(case, observe(case), 2e-6)


@pytest.mark.usefixtures("_on_cuda")
def test_a_constant_channel_has_variance_zero():
    moments = cuda.moments(torch.full((6, 3), 5.0), None, torch.float64)
    assert moments.m2.tolist() == [0, 0, 0]
    assert moments.mean.tolist() == [5, 5, 5]


def test_the_stand_ins_have_the_arguments_that_torch_gives_the_operations():
    source = inspect.getsource(_functions.SyncBatchNorm)
    for name in (stand_in.__name__ for stand_in in STAND_INS):
        assert f"torch.{name}(" in source
    # And by name as torch's own registry has them.
    for stand_in in STAND_INS:
        schema = getattr(torch.ops.aten, stand_in.__name__).default._schema
        assert len(schema.arguments) == len(inspect.signature(stand_in).parameters)


def test_a_gpu_is_what_chooses_them():
    assert kernels._BY_DEVICE["cuda"] is cuda
    assert kernels._BY_DEVICE["cpu"] is not cuda
