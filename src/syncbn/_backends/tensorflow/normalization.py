"""Normalization by the moments of the global batch, with its gradient, on TensorFlow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from syncbn._backends.interface import Activation, Batch, Scheme
from syncbn._backends.tensorflow import collectives, health, inversion, virtual
from syncbn._backends.tensorflow.composed import composed
from syncbn._backends.tensorflow.kernels import kernel_for
from syncbn._backends.tensorflow.scaling import Correction, Kernel, Scaling, statistics_dtype
from syncbn._backends.tensorflow.views import View
from syncbn.groups import Groups
from syncbn.moments import Moments

__all__ = ["normalize"]

_NOT_DERIVABLE = (
    "Synchronized batch normalization requires reverse-mode differentiation (tf.GradientTape). "
    "Received: forward-mode differentiation or a gradient through tf.vectorized_map, which do not "
    "know its gradient. Use tf.GradientTape, and tf.map_fn in place of tf.vectorized_map."
)


def normalize(
    batch: Batch, scheme: Scheme, affine: Callable[[Moments], tuple[Any | None, Any | None]]
) -> tuple[Any, Moments]:
    """Normalize by the moments of the concatenated batch of all replicas.

    `y = (x − mean) · gamma / √(variance + epsilon) + beta`, and for a cotangent dy of y

        dx = gamma / √(variance + epsilon) · (dy − w · Σ dy / n − w · x̂ · Σ dy·x̂ / n)

    where mean, the biased variance, n and both sums are over all replicas of the group, w is the
    weight of the element and n the sum of the weights; an element of weight 0 does not exist: its
    dx is 0, its dy in no sum. The gradients of gamma and beta are those of this replica's part
    (`Σ dy·x̂` and `Σ dy` over it): training adds them up over the replicas, as it does those of
    every other weight.

    One collective forward and one backward; none for one replica. The gradient keeps
    the input, or the output in its place, the weights, and vectors of the size of the channels.

    Args:
        batch: this replica's part. Inputs in float64, float32, bfloat16 or float16, any rank, any
            size but the channels may be unknown, and 0.
        scheme: how to normalize.
        affine: gives gamma and beta, each of shape (C,), or None for ones and zeros, for the
            moments that normalize.

    Returns:
        The outputs, in the dtype of the inputs, and the moments of the union of all replicas:
        float64, or float32 on TPU.

    Raises:
        NotSynchronizableError: the replicas cannot meet here.
        InputError: the groups are no partition of the replicas.
        LookupError: from TensorFlow, by forward-mode differentiation.
        InvalidArgumentError: from TensorFlow, where NaN or infinity was looked for and found, or
            the output is to be kept and cannot be inverted.

    References:
        Ioffe, Szegedy, "Batch Normalization", arXiv:1502.03167, 2015 (the gradient: section 3).
    """
    collectives.check_owner(next(iter(batch.state.values())))
    groups = scheme.grouping.over(collectives.replica_count())
    if batch.weights is not None:
        # Not an error for who would derive them: TensorFlow derives a tf.function by all it takes.
        batch = batch._replace(weights=tf.stop_gradient(batch.weights))
    if scheme.virtual_batch_size is not None:
        return virtual.normalize(batch, scheme, affine)
    return _by_groups(batch, scheme, affine, groups)


def _by_groups(
    batch: Batch,
    scheme: Scheme,
    affine: Callable[[Moments], tuple[Any | None, Any | None]],
    groups: Groups | None,
) -> tuple[Any, Moments]:
    (channels,) = next(iter(batch.state.values())).shape
    view = View.of(batch.inputs, batch.axis, channels)
    # The gradient below is that of the statistics too. Whoever would take one here, past it, must
    # not find a constant: forward-mode differentiation and tf.vectorized_map look inside.
    constant = view.of_tensor(
        tf.raw_ops.PreventGradient(input=batch.inputs, message=_NOT_DERIVABLE)
    )
    weights = None if batch.weights is None else view.of_weights(batch.weights)
    kernel = kernel_for(batch.inputs, batch.axis)
    local = kernel.moments(constant, weights, collectives.moments_dtype())
    if scheme.watch is not None:
        scheme.watch(local)
    moments, union = health.exchange(local, groups, batch.state, scheme.checked_layer)
    dtype = statistics_dtype(batch.inputs.dtype)
    gamma, beta = affine(moments)
    gamma = tf.ones(channels, dtype) if gamma is None else tf.cast(gamma, dtype)
    beta = tf.zeros(channels, dtype) if beta is None else tf.cast(beta, dtype)
    part = _Part(kernel, view, moments, weights, scheme.epsilon, groups)
    if scheme.kept_output is not None:
        dtype = batch.inputs.dtype
        gamma, beta, union = inversion.checked(scheme.kept_output, gamma, beta, dtype, union)
        return _keeping_the_output(part, scheme, batch.inputs, gamma, beta), union
    if scheme.activation is None:
        return _normalized(part, batch.inputs, gamma, beta), union
    return _activated(part, scheme.activation, batch.inputs, gamma, beta), union


class _Part(NamedTuple):
    """What forward and backward of one call have in common."""

    kernel: Kernel
    view: View
    moments: Moments  # of the group
    weights: Any | None  # as a view
    epsilon: float
    groups: Groups | None


def _normalized(part: _Part, inputs: Any, gamma: Any, beta: Any) -> Any:
    """The outputs, with a gradient that knows that the moments are those of the inputs."""

    @tf.custom_gradient
    def normalize(x: Any, gamma: Any, beta: Any) -> tuple[Any, Any]:
        scaling = Scaling.of(part.moments, gamma, beta, part.epsilon)
        view = part.view

        def gradient(dy: Any) -> tuple[Any, ...]:
            dy = tf.convert_to_tensor(dy)  # of tf.gather it is IndexedSlices
            dx, outputs, normalized = _gradient(
                part, view.of_tensor(dy), view.of_tensor(x), scaling
            )
            return view.to_tensor(dx), normalized, outputs

        outputs = part.kernel.apply(view.of_tensor(x), scaling)
        return view.to_tensor(outputs), gradient

    return normalize(inputs, gamma, beta)


def _activated(part: _Part, activation: Activation, inputs: Any, gamma: Any, beta: Any) -> Any:
    """The activation of the outputs, which the backward computes again rather than keep."""

    @tf.custom_gradient
    def activate(*arguments: Any) -> tuple[Any, Any]:
        def forward(x: Any, gamma: Any, beta: Any) -> Any:
            return activation(_normalized(part, x, gamma, beta))

        def gradient(dy: Any) -> tuple[Any, ...]:
            # Later than dy, or the forward's outputs would be found to be the same, and kept.
            with tf.control_dependencies([dy]):
                again = [tf.identity(argument) for argument in arguments]
            with tf.GradientTape() as tape:
                tape.watch(again)
                outputs = forward(*again)
            gradients = tape.gradient(
                outputs,
                again,
                output_gradients=tf.convert_to_tensor(dy),
                unconnected_gradients=tf.UnconnectedGradients.ZERO,
            )
            return tuple(gradients)

        return forward(*arguments), gradient

    return activate(inputs, gamma, beta)


def _keeping_the_output(part: _Part, scheme: Scheme, inputs: Any, gamma: Any, beta: Any) -> Any:
    """The activation of the outputs, with a gradient that finds what it needs in the result."""
    assert scheme.kept_output is not None
    slope = scheme.kept_output.negative_slope

    @tf.custom_gradient
    def normalize(x: Any, gamma: Any, beta: Any) -> tuple[Any, Any]:
        scaling = Scaling.of(part.moments, gamma, beta, part.epsilon)
        view = part.view
        outputs = view.to_tensor(part.kernel.apply(view.of_tensor(x), scaling))
        if scheme.activation is not None:
            outputs = scheme.activation(outputs)

        def gradient(dy: Any) -> tuple[Any, ...]:
            dy = tf.convert_to_tensor(dy)
            # Nothing of the size of the outputs runs, and fills memory, before dy is there.
            with tf.control_dependencies([dy]):
                kept = view.of_tensor(tf.identity(outputs))
            backward = inversion.of_output(scaling, beta, slope, outputs.dtype)

            def of_part(dy: Any, kept: Any, mean: Any, gamma: Any) -> Any:  # noqa: ARG001
                return _gradient_of_part(part, dy, kept, backward)

            # By the mean it hangs on x, however the output does.
            dx, of_beta, of_gamma = inversion.derivable_once(
                of_part, view.of_tensor(dy), kept, scaling.mean, gamma
            )
            return view.to_tensor(dx), of_gamma, of_beta

        return outputs, gradient

    return normalize(inputs, gamma, beta)


def _gradient(part: _Part, dy: Any, x: Any, scaling: Scaling) -> tuple[Any, Any, Any]:
    """The gradient for one replica, by the fast kernels, itself differentiable."""

    @tf.custom_gradient
    def fast(dy: Any, x: Any, gamma: Any) -> tuple[Any, Callable[..., Any]]:
        def second_order(*cotangents: Any) -> Any:
            # The moments depend on x, and here that counts: compute them again, from operations
            # that TensorFlow can derive. Two more collectives, paid by gradients of gradients only.
            with tf.GradientTape() as tape:
                tape.watch((dy, x, gamma))
                local = composed.moments(x, part.weights, collectives.moments_dtype())
                again = collectives.exchange(local, part.groups).own
                derivable = Scaling.of(again, gamma, gamma, part.epsilon)  # no beta in it
                derived = part._replace(kernel=composed, moments=again)
                results = _gradient_of_part(derived, dy, x, derivable)
            return tape.gradient(
                results,
                (dy, x, gamma),
                output_gradients=cotangents,
                unconnected_gradients=tf.UnconnectedGradients.ZERO,
            )

        return _gradient_of_part(part, dy, x, scaling), second_order

    # What does not depend on dy would else run, and fill memory, as early as in the forward pass.
    with tf.control_dependencies([dy]):
        x = tf.identity(x)
    gradients: tuple[Any, Any, Any] = fast(dy, x, scaling.gamma)
    return gradients


def _gradient_of_part(part: _Part, dy: Any, x: Any, scaling: Scaling) -> tuple[Any, Any, Any]:
    """dx, and this replica's sums for beta and gamma."""
    kernel, weights = part.kernel, part.weights
    sums, scaled = kernel.sums(dy, x, weights, scaling)
    packed, normalized = sums.normalized(scaling)
    total = collectives.sum_over_group(packed, part.groups)
    correction = Correction.of(total, part.moments.count, scaling)
    dx = kernel.gradient(dy, x, weights, scaling, correction, scaled)
    return dx, sums.outputs, normalized
