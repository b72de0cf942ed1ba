"""Normalization by the moments of the global batch, with its gradient, on TensorFlow."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import tensorflow as tf

from syncbn._backends.tensorflow import collectives, kernels
from syncbn._backends.tensorflow.kernels import CotangentSums, Scaling
from syncbn._backends.tensorflow.namespace import xp
from syncbn._backends.tensorflow.views import View
from syncbn.moments import Moments, as_divisor

__all__ = ["normalize_by_global_batch"]

_NOT_DERIVABLE = (
    "Synchronized batch normalization requires reverse-mode differentiation (tf.GradientTape). "
    "Received: forward-mode differentiation or a gradient through tf.vectorized_map, which do not "
    "know its gradient. Use tf.GradientTape, and tf.map_fn in place of tf.vectorized_map."
)


def normalize_by_global_batch(
    inputs: Any, gamma: Any | None, beta: Any | None, axis: int, epsilon: float, state: Any
) -> tuple[Any, Moments]:
    """Normalize by the moments of the concatenated batch of all replicas.

    `y = (x − mean) · gamma / √(variance + epsilon) + beta`, and for a cotangent dy of y

        dx = gamma / √(variance + epsilon) · (dy − Σ dy / n − x̂ · Σ dy·x̂ / n)

    where mean, the biased variance, n and both sums are over all replicas. The gradients of gamma
    and beta are those of this replica's part (`Σ dy·x̂` and `Σ dy` over it): training adds them up
    over the replicas, as it does those of every other weight.

    One collective forward and one backward; none for one replica. The gradient keeps
    the input and vectors of the size of the channels.

    Args:
        inputs: float64, float32, bfloat16 or float16, any rank, any size but the channels may be
            unknown, and 0.
        gamma: shape (C,), or None for ones.
        beta: shape (C,), or None for zeros.
        axis: that of the channels.
        epsilon: added to the variance.
        state: a variable of the layer, shape (C,), made under the strategy it trains under.

    Returns:
        The outputs, in the dtype of the inputs, and the global moments: float64, or float32 on TPU.

    Raises:
        NotSynchronizableError: the replicas cannot meet here.
        LookupError: from TensorFlow, by forward-mode differentiation.

    References:
        Ioffe, Szegedy, "Batch Normalization", arXiv:1502.03167, 2015 (the gradient: section 3).
    """
    collectives.check_owner(state)
    (channels,) = state.shape
    dtype = _statistics_dtype(inputs.dtype)
    view = View.of(inputs, axis, channels)
    # The gradient below is that of the statistics too. Whoever would take one here, past it, must
    # not find a constant: forward-mode differentiation and tf.vectorized_map look inside.
    constant = view.of_tensor(tf.raw_ops.PreventGradient(input=inputs, message=_NOT_DERIVABLE))
    local = kernels.kernel_for(inputs.dtype).moments(constant, collectives.moments_dtype())
    moments = collectives.global_moments(local)
    gamma = tf.ones(channels, dtype) if gamma is None else tf.cast(gamma, dtype)
    beta = tf.zeros(channels, dtype) if beta is None else tf.cast(beta, dtype)
    return _normalize(inputs, gamma, beta, moments, epsilon, view), moments


def _normalize(
    inputs: Any, gamma: Any, beta: Any, moments: Moments, epsilon: float, view: View
) -> Any:
    """The outputs, with a gradient that knows that the moments are those of the inputs."""

    @tf.custom_gradient
    def normalize(x: Any, gamma: Any, beta: Any) -> tuple[Any, Callable[..., tuple[Any, ...]]]:
        scaling = Scaling.of(moments, gamma, beta, epsilon)

        def gradient(dy: Any) -> tuple[Any, Any, Any]:
            dy = tf.convert_to_tensor(dy)  # of tf.gather it is IndexedSlices
            dx, sums = _gradient(view.of_tensor(dy), view.of_tensor(x), scaling, moments)
            return view.to_tensor(dx), sums.normalized, sums.outputs

        outputs = kernels.kernel_for(x.dtype).apply(view.of_tensor(x), scaling)
        return view.to_tensor(outputs), gradient

    return normalize(inputs, gamma, beta)


def _gradient(dy: Any, x: Any, scaling: Scaling, moments: Moments) -> tuple[Any, CotangentSums]:
    """The gradient for one replica, by the fast kernels, itself differentiable."""

    @tf.custom_gradient
    def fast(dy: Any, x: Any, gamma: Any) -> tuple[Any, Callable[..., Any]]:
        def second_order(*cotangents: Any) -> Any:
            # The moments depend on x, and here that counts: compute them again, from operations
            # that TensorFlow can derive. Two more collectives, paid by gradients of gradients only.
            with tf.GradientTape() as tape:
                tape.watch((dy, x, gamma))
                again = collectives.global_moments(
                    kernels.composed.moments(x, collectives.moments_dtype())
                )
                derivable = Scaling.of(again, gamma, scaling.beta, scaling.epsilon)
                results = _gradient_by(kernels.composed, dy, x, derivable, again.count)
            return tape.gradient(
                results,
                (dy, x, gamma),
                output_gradients=cotangents,
                unconnected_gradients=tf.UnconnectedGradients.ZERO,
            )

        kernel = kernels.kernel_for(gamma.dtype)
        return _gradient_by(kernel, dy, x, scaling, moments.count), second_order

    # What does not depend on dy would else run, and fill memory, as early as in the forward pass.
    with tf.control_dependencies([dy]):
        x = tf.identity(x)
    dx, *sums = fast(dy, x, scaling.gamma)
    return dx, CotangentSums(*sums)


def _gradient_by(
    kernel: SimpleNamespace, dy: Any, x: Any, scaling: Scaling, count: Any
) -> tuple[Any, Any, Any]:
    """dx, and this replica's sums for beta and gamma."""
    # In half precision the three terms of dx would each be rounded, and their small sum lost.
    dtype = scaling.gamma.dtype
    wide_dy, wide_x = tf.cast(dy, dtype), tf.cast(x, dtype)
    scaled, sums = kernel.backward(wide_dy, wide_x, scaling)
    total = _sum_over_replicas(sums)
    divisor = tf.cast(as_divisor(count, xp), dtype)
    factor = scaling.gamma * scaling.inverse_deviation() / divisor
    # −gamma/√(…)·(x̂·Σ dy·x̂ + Σ dy)/n has the form of a normalization of x: one more fused pass.
    correction = kernel.apply(
        wide_x, scaling._replace(gamma=-factor * total.normalized, beta=-factor * total.outputs)
    )
    return tf.cast(scaled + correction, x.dtype), sums.outputs, sums.normalized


def _sum_over_replicas(sums: CotangentSums) -> CotangentSums:
    if collectives.replica_count() == 1:
        return sums
    packed = collectives.sum_over_replicas(tf.stack(sums))
    return CotangentSums(packed[0], packed[1])


def _statistics_dtype(dtype: Any) -> Any:
    return tf.float64 if dtype == tf.float64 else tf.float32
