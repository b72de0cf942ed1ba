"""SyncBatchNormalization: batch normalization by the statistics of the global batch."""

from __future__ import annotations

import inspect
from typing import Any

import keras
from keras import ops

from syncbn import _backends
from syncbn._keras import aggregates_assignments, in_symbolic_scope, without_autocast
from syncbn.errors import UnsupportedFeatureError
from syncbn.moments import Moments

__all__ = ["SyncBatchNormalization"]

_BASE_ARGUMENTS = inspect.signature(keras.layers.BatchNormalization.__init__).parameters


@keras.saving.register_keras_serializable(package="syncbn")
class SyncBatchNormalization(keras.layers.BatchNormalization):
    """Batch normalization by the statistics of the whole global batch of all replicas.

    In training, on every replica of a `tf.distribute` strategy,

        y = gamma · (x − mean) / √(variance + epsilon) + beta

    where mean and biased variance are those of each channel over all elements of all replicas:
    elements are counted, so that replicas may hold parts of different sizes, or none. Gradients
    flow through the statistics to every replica. One collective forward and one backward; none in
    inference, none when frozen, none on one device.

    The conventions are Keras's: `moving = moving · momentum + batch · (1 − momentum)`, the biased
    variance also in the moving average, `trainable=False` means inference. Moving statistics are
    bitwise the same on every replica; a globally empty batch leaves them untouched. Inference is
    `keras.layers.BatchNormalization`'s own. Names, order and shapes of the weights are its too, so
    that `set_weights` takes those of the other. (`.weights.h5` files address layers by the name of
    their class: one of a model with plain layers does not load into one with these.)

    Shapes:
        inputs: any rank, channels on `axis`; every other size may be unknown, differ between
        replicas, or be 0. Outputs: the same.

    Dtypes:
        Inputs in float16, bfloat16, float32 or float64, by the layer's dtype policy. Statistics are
        kept in float32 at least, and merged over replicas in float64 (on TPU as a float32 table).

    Strategies:
        none, OneDeviceStrategy, MirroredStrategy, MultiWorkerMirroredStrategy (in a custom loop).
        Every replica must call the layer as often and in the same order as the others.

    Args:
        axis: the axis of the channels; 1 after a convolution with
            `data_format="channels_first"`.
        momentum: share of the old value in a step of the moving average.
        epsilon: added to the variance; in the unit of the input squared.
        center: add `beta`.
        scale: multiply by `gamma`.
        beta_initializer: initializer of `beta`.
        gamma_initializer: initializer of `gamma`.
        moving_mean_initializer: initializer of `moving_mean`.
        moving_variance_initializer: initializer of `moving_variance`.
        beta_regularizer: regularizer of `beta`, or None.
        gamma_regularizer: regularizer of `gamma`, or None.
        beta_constraint: constraint of `beta`, or None.
        gamma_constraint: constraint of `gamma`, or None.
        renorm: batch renormalization; not supported yet, must be False.
        renorm_clipping: kept in the configuration; of no effect without `renorm`.
        renorm_momentum: kept in the configuration; of no effect without `renorm`.
        **kwargs: of `keras.layers.Layer`: `name`, `dtype`, `trainable`.

    Raises:
        UnsupportedFeatureError: `renorm=True`; in training, an input with a mask.
        NotSynchronizableError: in training, where the replicas cannot meet: under
            ParameterServerStrategy, in the cross-replica context, outside of the strategy that the
            layer was made under, inside `tf.cond` or `tf.while_loop` within a replica, on a Keras
            backend other than TensorFlow.
        LookupError: from TensorFlow, by forward-mode differentiation.

    References:
        Ioffe, Szegedy, "Batch Normalization", arXiv:1502.03167, 2015.
        Peng et al., "MegDet: A Large Mini-Batch Object Detector", arXiv:1711.07240, 2017
        (normalization over the batches of several devices).
    """

    def __init__(
        self,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        renorm: bool = False,
        renorm_clipping: dict[str, float] | None = None,
        renorm_momentum: float = 0.99,
        **kwargs: Any,
    ) -> None:
        if "synchronized" in kwargs:
            raise TypeError(
                "SyncBatchNormalization takes the arguments of keras.layers.BatchNormalization "
                f"but `synchronized`. Received: synchronized={kwargs['synchronized']!r}. Remove "
                "it: this layer always synchronizes."
            )
        if renorm:
            raise UnsupportedFeatureError(
                "SyncBatchNormalization requires renorm=False: batch renormalization is not "
                f"supported yet. Received: renorm={renorm!r}. Remove the argument, or use "
                "keras.layers.BatchNormalization(renorm=True), which does not synchronize."
            )
        renorm_arguments = {"renorm_clipping": renorm_clipping, "renorm_momentum": renorm_momentum}
        super().__init__(
            axis=axis,
            momentum=momentum,
            epsilon=epsilon,
            center=center,
            scale=scale,
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            moving_mean_initializer=moving_mean_initializer,
            moving_variance_initializer=moving_variance_initializer,
            beta_regularizer=beta_regularizer,
            gamma_regularizer=gamma_regularizer,
            beta_constraint=beta_constraint,
            gamma_constraint=gamma_constraint,
            # Keras knows them since 3.13 only; without renorm they are configuration alone.
            **{name: value for name, value in renorm_arguments.items() if name in _BASE_ARGUMENTS},
            **kwargs,
        )
        # For code that asks any batch normalization whether it synchronizes. Not by way of the base
        # class, whose constructor refuses it on other backends and serializes it.
        self.synchronized = True

    def add_weight(self, *args: Any, **kwargs: Any) -> Any:
        """The weight as Keras makes it, but written on each replica by itself.

        By default Keras 3.7 averages over the replicas what is assigned to a variable: one more
        reduction for each moving statistic, of values that are the same everywhere.
        """
        if aggregates_assignments():
            kwargs.setdefault("aggregation", "none")
        return super().add_weight(*args, **kwargs)

    def call(self, inputs: Any, training: bool | None = None, mask: Any | None = None) -> Any:
        """Normalize by the global batch in training, by the moving statistics in inference.

        Args:
            inputs: tensor of the rank the layer was built with.
            training: True for the statistics of the batch, which also move the moving statistics;
                has no effect when the layer is frozen by `trainable=False`.
            mask: not supported in training yet; without effect in inference, as in Keras.

        Returns:
            Tensor of the shape of the inputs, in the layer's compute dtype.
        """
        # While Keras only asks for shapes there is no batch, and often no replica.
        if not (training and self.trainable) or in_symbolic_scope():
            return super().call(inputs, training=False, mask=mask)
        if mask is not None:
            raise UnsupportedFeatureError(
                f"Layer {self.name!r} requires inputs without a mask in training: masked "
                f"statistics are not supported yet. Received: a mask of shape {mask.shape} for "
                f"inputs of shape {inputs.shape}. Remove the mask before this layer, or use "
                "keras.layers.BatchNormalization, which respects it and does not synchronize."
            )
        backend = _backends.get(keras.backend.backend())
        inputs = ops.convert_to_tensor(inputs)
        if not keras.backend.is_float_dtype(inputs.dtype):
            inputs = ops.cast(inputs, keras.backend.result_type(inputs.dtype, "float32"))
        with without_autocast():
            outputs, moments = backend.normalize_by_global_batch(
                inputs,
                # Before Keras 3.5 the attribute is missing without the weight.
                self.gamma if self.scale else None,
                self.beta if self.center else None,
                self.axis,
                self.epsilon,
                self.moving_mean.value,
            )
            self._move_statistics(moments)
        return ops.cast(outputs, self.compute_dtype)

    def _move_statistics(self, moments: Moments) -> None:
        """`moving · momentum + batch · (1 − momentum)`; nothing moves by an empty global batch."""
        share = ops.cast(moments.count > 0, moments.count.dtype) * (1.0 - self.momentum)
        for moving, batch in (
            (self.moving_mean, moments.mean),
            (self.moving_variance, moments.variance(ops)),
        ):
            old = ops.cast(moving, batch.dtype)
            moving.assign(old + (batch - old) * share)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, as Keras serializes them."""
        config: dict[str, Any] = super().get_config()
        config.pop("synchronized", None)
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SyncBatchNormalization:
        """The layer of a configuration, also of one that a `BatchNormalization` has given."""
        layer: SyncBatchNormalization = super().from_config(
            {name: value for name, value in config.items() if name != "synchronized"}
        )
        return layer
