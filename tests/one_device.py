"""A step of any layer on one device, not compiled, on the backend that Keras runs on."""

from __future__ import annotations

import contextlib
from typing import Any

import keras
import numpy as np

from tests.harness import numbers
from tests.which_keras import framework_variable


def precision(policy: str) -> Any:
    """A scope where arrays of that policy's dtypes exist: on JAX float64 does by an option."""
    if policy == "float64" and keras.backend.backend() == "jax":
        import jax

        return jax.enable_x64(True)
    return contextlib.nullcontext()


def step(
    layer: Any, x: np.ndarray, dy: np.ndarray, *, training: bool = True, **call_arguments: Any
) -> list[np.ndarray]:
    """Outputs, and the gradients of x, gamma and beta by dy, of those that the layer has.

    The layer's moving statistics are moved.
    """
    weights = [getattr(layer, name, None) for name in ("gamma", "beta")]
    weights = [weight for weight in weights if weight is not None]
    take = {"jax": _jax, "tensorflow": _tensorflow, "torch": _torch}[keras.backend.backend()]
    return [
        numbers(v) for v in take(layer, weights, x, dy, call_arguments | {"training": training})
    ]


def _tensorflow(layer: Any, weights: Any, x: Any, dy: Any, call_arguments: Any) -> list[Any]:
    import tensorflow as tf

    x, values = tf.constant(x), [framework_variable(weight) for weight in weights]
    with tf.GradientTape() as tape:
        tape.watch([x, *values])
        y = layer(x, **call_arguments)
    return [y, *tape.gradient(y, [x, *values], tf.cast(dy, y.dtype))]


def _jax(layer: Any, weights: Any, x: Any, dy: Any, call_arguments: Any) -> list[Any]:
    import jax

    trainable = layer.trainable_variables
    # Of a frozen layer gamma and beta are among these.
    others = layer.non_trainable_variables
    paths = [weight.path for weight in weights]

    def forward(x: Any, values: Any) -> Any:
        own = dict(zip(paths, values, strict=True))
        held = ([own.get(v.path, v.value) for v in some] for some in (trainable, others))
        return layer.stateless_call(*held, x, **call_arguments)

    y, pull_back, state = jax.vjp(
        forward, jax.numpy.asarray(x), [weight.value for weight in weights], has_aux=True
    )
    for variable, value in zip(others, state, strict=True):
        variable.assign(value)
    dx, of_weights = pull_back(jax.numpy.asarray(dy).astype(y.dtype))
    return [y, dx, *of_weights]


def _torch(layer: Any, weights: Any, x: Any, dy: Any, call_arguments: Any) -> list[Any]:
    import torch

    x = torch.tensor(x, requires_grad=True)
    values = [weight.value for weight in weights]
    frozen = [value for value in values if not value.requires_grad]
    for value in frozen:
        value.requires_grad_(True)
    y = layer(x, **call_arguments)
    gradients = torch.autograd.grad(y, [x, *values], torch.tensor(dy).to(y.dtype))
    for value in frozen:
        value.requires_grad_(False)
    return [y, *gradients]
