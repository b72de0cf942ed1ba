"""SyncBatchNormalization for tf_keras, which is Keras 2: `tf.keras` with TF_USE_LEGACY_KERAS=1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from syncbn._backends.interface import Scheme
from syncbn._backends.tensorflow.graphs import is_being_saved, tf_keras_infers_shapes
from syncbn.arguments import refuse_synchronized
from syncbn.errors import InputError, NotSynchronizableError, UnsupportedFeatureError
from syncbn.own_arguments import OwnArguments

try:
    import tf_keras
except ModuleNotFoundError as error:
    if error.name != "tf_keras":
        raise
    raise ModuleNotFoundError(
        "syncbn.tf_keras requires the package tf_keras. Received: no such package. Install it: "
        "pip install tf_keras; or take syncbn.SyncBatchNormalization, which is Keras 3's.",
        name="tf_keras",
    ) from error

__all__ = ["SyncBatchNormalization"]

# By the definitions of Keras 2, some of which are others in Keras 3, as of hard_sigmoid.
_ACTIVATIONS = {
    name: tf_keras.activations.get(name)
    for name in (
        *("elu", "exponential", "gelu", "hard_sigmoid", "leaky_relu", "linear", "log_softmax"),
        *("mish", "relu", "relu6", "selu", "sigmoid", "softmax", "softplus", "softsign"),
        *("swish", "tanh"),
    )
}


@tf_keras.saving.register_keras_serializable(package="syncbn")
class SyncBatchNormalization(OwnArguments, tf_keras.layers.BatchNormalization):
    """Batch normalization by the statistics of the whole global batch, for models of tf_keras.

    In training, on every replica of a `tf.distribute` strategy,

        y = activation(gamma · (x − mean) / √(variance + epsilon) + beta)

    with mean and biased variance over all elements of a channel on all replicas. It is
    `syncbn.SyncBatchNormalization` in all but the Keras that it is a layer of: what is said there
    of shapes, dtypes, masks, weights, strategies and of what moving statistics are holds here.

    Inference, and training of a layer with `trainable=False`, is
    `tf_keras.layers.BatchNormalization`'s own, without a collective. Names, order and shapes of the
    weights are its too, but with virtual batches, where those of tf_keras have the inputs' rank.
    Weights are float32 at least, as in tf_keras.

    Moving statistics are bitwise the same on every replica, and read from the first: tf_keras
    averages over the replicas on each reading, which rounds, and communicates to save a model.

    Args:
        axis: the axis of the channels, or a list of this one axis, as tf_keras saves it.
        momentum: share of the old value in a step of the moving average. None for the average of
            all batches so far.
        epsilon: added to the variance.
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
        renorm: batch renormalization.
        renorm_clipping: limits `rmin`, `rmax` and `dmax` of it.
        renorm_momentum: momentum of the moving statistics of renormalization.
        fused: the kernel of inference, as in tf_keras: None for the fused one where it can be used.
            Training has kernels of its own.
        group_size: normalize by the statistics of consecutive groups of so many replicas.
        group_assignment: lists of the replicas that normalize together.
        virtual_batch_size: normalize every so many examples of a replica by themselves. The
            attribute of this name is None: the base class would reshape inputs by it.
        unbiased_moving_variance: `M2 / (n − 1)` in the moving average.
        activation: name of an activation of tf_keras that is applied to the outputs.
        nan_check: in training stop with an error at NaN or infinity.
        save: what the backward keeps, "input" or "output".
        **kwargs: of `tf_keras.layers.Layer`: `name`, `dtype`, `trainable`.

    Raises:
        InputError: an argument that cannot be; several axes; `adjustment`; in training, groups that
            are no partition of the replicas; a mask or weights that do not fit the inputs.
        NotSynchronizableError: Keras 3, whose operations this layer is made of, does not run on
            TensorFlow; in training, where the replicas cannot meet.
        UnsupportedFeatureError: `training` is a tensor whose value is not known while tracing;
            `nan_check=True` or `save="output"` compiled by XLA.

    References:
        See `syncbn.SyncBatchNormalization`.
    """

    _wraps_variables = False
    _activations = SimpleNamespace(**_ACTIVATIONS, silu=_ACTIVATIONS["swish"])

    def __init__(
        self,
        axis: int | Sequence[int] = -1,
        momentum: float | None = 0.99,
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
        *,
        renorm: bool = False,
        renorm_clipping: Mapping[str, float] | None = None,
        renorm_momentum: float = 0.99,
        fused: bool | None = None,
        group_size: int | None = None,
        group_assignment: Sequence[Sequence[int]] | None = None,
        virtual_batch_size: int | None = None,
        unbiased_moving_variance: bool = False,
        activation: Any = None,
        nan_check: bool = False,
        save: str = "input",
        **kwargs: Any,
    ) -> None:
        refuse_synchronized(kwargs)
        _refuse_adjustment(kwargs)
        _require_tensorflow()
        super().__init__(
            axis=_one_axis(axis),
            momentum=0.0 if momentum is None else momentum,
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
            renorm=renorm,
            fused=fused,
            **kwargs,
        )
        # For code that asks. Not by way of the base class, which would then refuse `fused`.
        self.synchronized = True
        self._given_fused = fused
        self._set_moving(momentum, unbiased_moving_variance)
        self._set_renorm(renorm, renorm_clipping, renorm_momentum)
        self._set_groups(group_size, group_assignment, virtual_batch_size)
        self._set_kernel(activation, nan_check, save)
        self._virtual_batch_size, self.virtual_batch_size = self.virtual_batch_size, None

    # Or tf_keras would wrap lists and dictionaries, and keep them in every checkpoint.
    _set_renorm = tf.__internal__.tracking.no_automatic_dependency_tracking(
        OwnArguments._set_renorm
    )
    _set_groups = tf.__internal__.tracking.no_automatic_dependency_tracking(
        OwnArguments._set_groups
    )

    def build(self, input_shape: Any) -> None:
        """Make the weights: tf_keras's, in its order, then those of this layer's own arguments."""
        super().build(input_shape)
        if self.momentum is None:
            self.num_batches_tracked = self.add_weight(
                name="num_batches_tracked",
                shape=(),
                initializer="zeros",
                dtype=tf.int64,
                trainable=False,
                synchronization=tf.VariableSynchronization.ON_READ,
                aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
                experimental_autocast=False,
            )

    def add_weight(self, *args: Any, **kwargs: Any) -> Any:
        """The weight as tf_keras makes it, but read from one replica.

        The average of equal numbers, which tf_keras takes, may be another number.
        """
        if kwargs.get("aggregation") == tf.VariableAggregation.MEAN:
            kwargs["aggregation"] = tf.VariableAggregation.ONLY_FIRST_REPLICA
        return super().add_weight(*args, **kwargs)

    # AutoGraph would rewrite all that is called here, to no effect but the time that it takes.
    @tf.autograph.experimental.do_not_convert
    def call(
        self,
        inputs: Any,
        training: Any = None,
        mask: Any | None = None,
        weights: Any | None = None,
    ) -> Any:
        """Normalize by the global batch in training, by the moving statistics in inference.

        Args:
            inputs: tensor of the rank the layer was built with.
            training: true for the statistics of the batch, which also move the moving statistics;
                has no effect when the layer is frozen by `trainable=False`.
            mask: True where an element counts, of the inputs' shape without their last axis.
            weights: how much each element counts, of the inputs' shape without the axis of the
                channels, or one for each example, or one for all.

        Returns:
            Tensor of the shape of the inputs, in the layer's compute dtype.

        Raises:
            InputError: a mask or weights that do not fit the inputs; negative, infinite or NaN
                weights; groups that are no partition of the replicas.
            NotSynchronizableError: in training, the replicas cannot meet here.
            UnsupportedFeatureError: `training` is not known while tracing.
        """
        inputs = tf.convert_to_tensor(inputs)
        if not self._trains(training):
            return self._infer(inputs)
        if is_being_saved():
            with tf.control_dependencies([_never_without_the_class(self.name)]):
                return tf.identity(self._infer(inputs))
        if keras.backend.is_float_dtype(inputs.dtype):
            inputs = tf.cast(inputs, self.compute_dtype)
        outputs = self._normalize_and_move(inputs, self.axis[0], mask, weights)
        return ops.cast(outputs, self.compute_dtype)

    def _infer(self, inputs: Any) -> Any:
        # Without a mask, which is of no effect there, and which the fused kernel would warn of.
        outputs = super().call(inputs, training=False)
        return outputs if self.activation is None else self.activation(outputs)

    def _trains(self, training: Any) -> bool:
        """Whether this call is one of training."""
        training = self._get_training_value(training)
        known = tf.get_static_value(training) if tf.is_tensor(training) else training
        # While tf_keras only asks for shapes there is no batch, and often no replica.
        if known is False or tf_keras_infers_shapes():
            return False
        if known is None:
            raise UnsupportedFeatureError(
                f"Layer {self.name!r} requires to know while tracing whether it trains: every "
                "replica must come to the same collectives. Received: training as a tensor. Give "
                "True or False."
            )
        return bool(known)

    def _scheme(self) -> Scheme:
        return super()._scheme()._replace(virtual_batch_size=self._virtual_batch_size)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, all of them, as tf_keras serializes them."""
        config: dict[str, Any] = super().get_config()
        config |= self._own_config()
        config["axis"] = _one_axis(self.axis)
        # Keras 3, which takes the rest of this, does not know it.
        if self._given_fused is not None:
            config["fused"] = self._given_fused
        config["virtual_batch_size"] = self._virtual_batch_size
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SyncBatchNormalization:
        """The layer of a configuration, also of one of tf_keras's own layers.

        Those are `BatchNormalization`, which leaves `synchronized` out of it, and
        `experimental.SyncBatchNormalization`.
        """
        axis = config.get("axis")
        if config.get("virtual_batch_size") is not None and isinstance(axis, Sequence):
            raise InputError(
                "SyncBatchNormalization.from_config requires the axis of the channels. Received: "
                f"axis={list(axis)!r} with virtual_batch_size, as tf_keras's BatchNormalization "
                "has it once it is built: it counts the axis of its virtual batches in. Set "
                "config['axis'] to the axis of the channels, an integer."
            )
        layer: SyncBatchNormalization = super().from_config(
            {name: value for name, value in config.items() if name != "synchronized"}
        )
        return layer


def _require_tensorflow() -> None:
    backend = keras.backend.backend()
    if backend != "tensorflow":
        raise NotSynchronizableError(
            "syncbn.tf_keras requires that Keras 3, which is installed beside tf_keras, runs on "
            f"TensorFlow too. Received: keras.backend.backend()={backend!r}. Set the environment "
            "variable KERAS_BACKEND=tensorflow before Keras is imported; models of tf_keras stay "
            "what they are."
        )


def _one_axis(axis: Any) -> Any:
    """The axis of the channels; tf_keras keeps it as a list, once the layer is built."""
    if not isinstance(axis, Sequence):
        return axis
    if len(axis) != 1:
        raise InputError(
            "SyncBatchNormalization requires one axis of the channels. Received: "
            f"axis={list(axis)!r}. Give one axis, and put the others into it with a Reshape layer "
            "before."
        )
    return axis[0]


def _refuse_adjustment(kwargs: dict[str, Any]) -> None:
    if kwargs.pop("adjustment", None) is not None:
        raise InputError(
            "SyncBatchNormalization requires statistics that are those of the batch. Received: "
            "adjustment, a function that no configuration can keep. Remove it, and put a layer "
            "that scales and shifts behind this one."
        )


def _never_without_the_class(layer: str) -> Any:
    """An operation that fails: what of training is in a SavedModel has no replicas to meet."""
    return tf.debugging.Assert(
        False,
        [
            f"Layer {layer} requires its class for training. Received: training=True in a "
            "SavedModel that was opened without it. Import syncbn.tf_keras before "
            "tf_keras.models.load_model opens it. Inference needs nothing."
        ],
    )
