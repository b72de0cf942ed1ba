"""SyncBatchNormalization: batch normalization by the statistics of the global batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops

from syncbn import _backends
from syncbn._keras import (
    aggregates_assignments,
    casts_arrays_unasked,
    counter_dtype,
    excludes_from_autocast,
    in_symbolic_scope,
    without_autocast,
)
from syncbn.arguments import (
    checked_axis_name,
    refuse_synchronized,
    saved_process_group,
)
from syncbn.moving import add_renorm_weights
from syncbn.own_arguments import OwnArguments

__all__ = ["SyncBatchNormalization"]


@keras.saving.register_keras_serializable(package="syncbn")
class SyncBatchNormalization(OwnArguments, keras.layers.BatchNormalization):
    """Batch normalization by the statistics of the whole global batch of all replicas.

    In training, on every replica (TensorFlow, JAX, torch: see Strategies),

        y = activation(gamma · (x − mean) / √(variance + epsilon) + beta)
        n = Σ w,   mean = Σ w · x / n,   variance = Σ w · (x − mean)² / n

    where the sums run over all elements of a channel on all replicas and w is an element's weight,
    1 without `mask` and `weights`: elements are counted, so that replicas may hold parts of
    different sizes, or none. Gradients flow through the statistics to every replica. One collective
    forward and one backward; none in inference, none when frozen, none on one device.

    The conventions are Keras's: `moving = moving · momentum + batch · (1 − momentum)`, the biased
    variance also in the moving average, `trainable=False` means inference. Moving statistics are
    bitwise the same on every replica; a globally empty batch leaves them untouched; each call of a
    layer that is called several times in a step moves them, in the order of the calls. Inference is
    `keras.layers.BatchNormalization`'s own. Names, order and shapes of the weights are its too, so
    that `set_weights` takes those of the other. (`.weights.h5` files address layers by the name of
    their class: one of a model with plain layers loads into one with these by `load_weights` of
    syncbn, not by Keras's.)

    A masked element, or one of weight 0, does not exist: it is in no statistic and no gradient,
    whatever it is, NaN too. Its own output is computed by the statistics of the rest, and no
    gradient flows through it. (Keras lets its cotangent into the gradients.)

    Shapes:
        inputs: any rank, channels on `axis`; every other size may be unknown, differ between
        replicas, or be 0. Outputs: the same.

    Dtypes:
        Inputs in float16, bfloat16, float32 or float64, by the layer's dtype policy. Statistics are
        kept in float32 at least, and merged over replicas in float64 (on TPU, JAX without x64 and
        Apple's GPUs as a float32 table).
        Weights are not rounded to the policy's dtype.

    Strategies:
        TensorFlow: none, OneDeviceStrategy, MirroredStrategy, MultiWorkerMirroredStrategy. JAX:
        `keras.distribution`, `shard_map`, `pmap`, `vmap(axis_name=…)`. torch: the processes of a
        process group. All replicas call the layer as often and in the same order.

    Args:
        axis: the axis of the channels; 1 after a convolution with
            `data_format="channels_first"`.
        momentum: share of the old value in a step of the moving average. None for the average of
            all batches so far, each of the same share, counted in `num_batches_tracked`, as torch.
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
        renorm: batch renormalization: in training the normalized input is multiplied by r and d is
            added, `r = σ_batch / σ` and `d = (mean_batch − mean) / σ` by moving statistics of its
            own, both without gradient.
        renorm_clipping: limits `rmin`, `rmax` of r and `dmax` of |d|; one left out is open.
        renorm_momentum: momentum of the moving statistics of renormalization.
        group_size: normalize by the statistics of consecutive groups of so many replicas, which
            must divide their number. 1 is local normalization. The moving statistics are in any
            case those of the union of all replicas, each group by its count.
        group_assignment: lists of the replicas that normalize together, each replica in one.
        virtual_batch_size: normalize every so many examples of a replica by themselves ("ghost
            batches", the last may be smaller). Only the moving statistics are synchronized. Not
            with groups or renorm.
        unbiased_moving_variance: `M2 / (n − 1)` in the moving average, as torch; normalization
            itself is always by the biased variance.
        activation: name of an activation of Keras that is applied to the outputs. The backward
            computes it again from the input, so that nothing more is kept.
        nan_check: in training stop with an error where the layer, its input or its variables have
            become NaN or infinite, and say which replica; before anything is updated.
        save: what of its size the backward keeps: "input", or "output" for
            `x̂ = (y − beta) / gamma`. Half the memory where what follows keeps its input anyway (a
            convolution, a dense layer), with `activation="leaky_relu"` inside, whose result is
            then kept; no other can be inverted. A relu behind the layer keeps its own result: there
            "output" is a tensor more. x̂ is off by about (1 + |beta / gamma|) roundings of the
            output; where half of its digits would go, and at gamma = 0, training stops with an
            error. Not with virtual batches, gradients of gradients, nor compiled by XLA, `jax.jit`
            or `torch.compile`. TensorFlow saves memory by it in a `tf.function` alone.
        axis_name: on JAX, the name or names of the mapped axes to synchronize over, of `shard_map`,
            `pmap` or `vmap(axis_name=…)`. By default found where JAX says; of no effect elsewhere.
        process_group: on torch, the `torch.distributed` group whose processes are the replicas; by
            default all. Saved as ranks, and then to be set anew. Of no effect elsewhere.
        **kwargs: of `keras.layers.Layer`: `name`, `dtype`, `trainable`, `autocast`.

    Raises:
        InputError: an argument that cannot be; in training, groups that are no partition of the
            replicas; a mask or weights that do not fit the inputs, or are negative or not finite.
        NotSynchronizableError: in training, where the replicas cannot meet: under
            ParameterServerStrategy, in the cross-replica context, outside of the strategy that the
            layer was made under, inside `tf.cond` or `tf.while_loop` within a replica; an axis_name
            that is not bound; a process outside of the process_group.
        UnsupportedFeatureError: `nan_check=True` or `save="output"` where the layer is compiled and
            cannot stop; gradients of gradients with `save="output"`.
        LookupError: from TensorFlow, by forward-mode differentiation.
        InvalidArgumentError (TensorFlow), FloatingPointError (JAX), InputError (torch): by
            `nan_check`, or by a gamma that `save="output"` cannot divide by.

    References:
        Ioffe, Szegedy, "Batch Normalization", arXiv:1502.03167, 2015.
        Ioffe, "Batch Renormalization", arXiv:1702.03275, 2017.
        Peng et al., "MegDet: A Large Mini-Batch Object Detector", arXiv:1711.07240, 2017
        (normalization over the batches of several devices).
        Hoffer, Hubara, Soudry, "Train longer, generalize better", arXiv:1705.08741, 2017 (ghost
        batches).
        Rota Bulò, Porzi, Kontschieder, "In-Place Activated BatchNorm for Memory-Optimized Training
        of DNNs", CVPR 2018, arXiv:1712.02616 (`save="output"`).
    """

    def __init__(
        self,
        axis: int = -1,
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
        renorm: bool = False,
        renorm_clipping: Mapping[str, float] | None = None,
        renorm_momentum: float = 0.99,
        *,
        group_size: int | None = None,
        group_assignment: Sequence[Sequence[int]] | None = None,
        virtual_batch_size: int | None = None,
        unbiased_moving_variance: bool = False,
        activation: Any = None,
        nan_check: bool = False,
        save: str = "input",
        axis_name: str | Sequence[str] | None = None,
        process_group: Any = None,
        **kwargs: Any,
    ) -> None:
        refuse_synchronized(kwargs)
        # Keras would round weights to the compute dtype as well; `call` casts the inputs alone.
        casts_inputs = kwargs.pop("autocast", True)
        super().__init__(
            axis=axis,
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
            autocast=False,
            **kwargs,
        )
        # For code that asks any batch normalization whether it synchronizes. Not by way of the base
        # class, whose constructor refuses it on other backends and serializes it.
        self.synchronized = True
        self._casts_inputs = casts_inputs
        self._set_moving(momentum, unbiased_moving_variance)
        self._set_renorm(renorm, renorm_clipping, renorm_momentum)
        self._set_groups(group_size, group_assignment, virtual_batch_size)
        self.axis_name = checked_axis_name(axis_name)
        self.process_group = process_group
        self._set_kernel(activation, nan_check, save)

    def build(self, input_shape: Any) -> None:
        """Make the weights: Keras's, in its order, then those of this layer's own arguments."""
        super().build(input_shape)
        if keras.backend.backend() == "torch":
            # What `call` needs, before torch.compile traces it: it can neither import nor try out.
            _backends.get("torch")
            casts_arrays_unasked()
        # Keras before 3.13 knows nothing of renorm.
        if self.renorm and not hasattr(self, "renorm_mean"):
            add_renorm_weights(self)
        if self.momentum is None:
            self.num_batches_tracked = self.add_weight(
                name="num_batches_tracked",
                shape=(),
                initializer="zeros",
                dtype=counter_dtype(),
                trainable=False,
                autocast=False,
            )

    def add_weight(self, *args: Any, **kwargs: Any) -> Any:
        """The weight as Keras makes it, but written on each replica by itself.

        By default Keras 3.7 averages over the replicas what is assigned to a variable: one more
        reduction for each moving statistic, of values that are the same everywhere.
        """
        if aggregates_assignments():
            kwargs.setdefault("aggregation", "none")
        if not excludes_from_autocast():
            # Nothing is lost: `call` reads the weights as they are stored.
            kwargs.pop("autocast", None)
        return super().add_weight(*args, **kwargs)

    @property
    def input_dtype(self) -> str:
        """The dtype that Keras converts inputs to; here `call` does so, with the inputs alone."""
        # What Keras casts all the same, `weights` too, is not to lose a digit on the way.
        return "float64" if casts_arrays_unasked() else str(self.compute_dtype)

    def call(
        self,
        inputs: Any,
        training: bool | None = None,
        mask: Any | None = None,
        weights: Any | None = None,
    ) -> Any:
        """Normalize by the global batch in training, by the moving statistics in inference.

        Args:
            inputs: tensor of the rank the layer was built with.
            training: True for the statistics of the batch, which also move the moving statistics;
                has no effect when the layer is frozen by `trainable=False`.
            mask: True where an element counts; as Keras hands it on from the layer before, the
                shape of the inputs without their last axis, also where the channels are not last;
                sizes of 1 are broadcast. What is masked does not exist for statistics and
                gradients; its output is computed by the statistics of the rest. Of no effect in
                inference, as in Keras.
            weights: how much each element counts in the statistics; the shape of the inputs without
                the axis of the channels, sizes of 1 are broadcast, or one for each example as
                Keras's `sample_weight`, or one for all. At least 0 and finite, checked where the
                values are known, which they are not inside a `tf.function`. A constant: no gradient
                flows to it. Weight 0 is a mask. Of no effect in inference.

        Returns:
            Tensor of the shape of the inputs, in the layer's compute dtype.

        Raises:
            InputError: a mask or weights that do not fit the inputs; negative, infinite or NaN
                weights; groups that are no partition of the replicas.
            NotSynchronizableError: in training, the replicas cannot meet here.
        """
        mask = getattr(inputs, "_keras_mask", None) if mask is None else mask
        inputs = self._as_input(inputs)
        # While Keras only asks for shapes there is no batch, and often no replica.
        if not (training and self.trainable) or in_symbolic_scope():
            outputs = super().call(inputs, training=False, mask=mask)
            return outputs if self.activation is None else self.activation(outputs)
        with without_autocast():
            outputs = self._normalize_and_move(inputs, self.axis, mask, weights)
        return ops.cast(outputs, self.compute_dtype)

    def _as_input(self, inputs: Any) -> Any:
        """The inputs as a tensor, in the compute dtype as Keras casts those of any layer."""
        inputs = ops.convert_to_tensor(inputs)
        if self._casts_inputs and keras.backend.is_float_dtype(inputs.dtype):
            inputs = ops.cast(inputs, self.compute_dtype)
        return inputs

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, as Keras serializes them."""
        config: dict[str, Any] = super().get_config()
        config.pop("synchronized", None)
        config |= self._own_config()
        config["axis_name"] = self.axis_name
        config["process_group"] = self.process_group
        if self.process_group is not None:
            config["process_group"] = saved_process_group(self.process_group)
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SyncBatchNormalization:
        """The layer of a configuration, also of one that a `BatchNormalization` has given.

        Keras 2 wrote `axis` as a list of one.
        """
        axis = config.get("axis", -1)
        if isinstance(axis, (list, tuple)) and len(axis) == 1:
            config = {**config, "axis": axis[0]}
        layer: SyncBatchNormalization = super().from_config(
            {name: value for name, value in config.items() if name != "synchronized"}
        )
        return layer
