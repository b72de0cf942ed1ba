"""What the layers have that Keras's do not, the same for Keras 3 and tf_keras.

Arguments as attributes, in the configuration, and as what a backend is given; and the training
step itself.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops

from syncbn import _backends
from syncbn._backends.interface import Batch, KeptOutput, Scheme
from syncbn.arguments import (
    activation_function,
    checked_renorm_momentum,
    checked_save,
    checked_virtual_batch_size,
    negative_slope,
)
from syncbn.groups import Grouping
from syncbn.moving import move_statistics
from syncbn.renorm import Clipping
from syncbn.variables import affine_of, state_of
from syncbn.weighting import check_values, element_weights

__all__ = ["OwnArguments"]


class OwnArguments:
    """Of a batch normalization of either Keras, whose constructor calls each `_set_…`."""

    # Of the layer that this is mixed into.
    name: Any
    epsilon: Any
    # Of one framework each; see SyncBatchNormalization's arguments.
    axis_name: Any = None
    process_group: Any = None
    # Whether a weight is an object of Keras with the framework's variable in it, as in Keras 3.
    _wraps_variables: bool = True
    # Where the names of activations come from.
    _activations: Any = keras.activations

    def _set_moving(self, momentum: float | None, unbiased: bool) -> None:
        self.momentum = None if momentum is None else float(momentum)
        self.unbiased_moving_variance = unbiased

    def _set_renorm(
        self, renorm: bool, clipping: Mapping[str, float] | None, momentum: float
    ) -> None:
        """Not by the base class: Keras knows it since 3.13 only, and its errors name no values."""
        self._clipping = Clipping.of(clipping if renorm else None)
        self.renorm = renorm
        self.renorm_clipping = dict(clipping or {}) if renorm else clipping
        self.renorm_momentum = checked_renorm_momentum(momentum)

    def _set_groups(
        self, size: int | None, assignment: Sequence[Sequence[int]] | None, virtual: int | None
    ) -> None:
        self.virtual_batch_size = checked_virtual_batch_size(
            virtual, group_size=size, group_assignment=assignment, renorm=self.renorm or None
        )
        self._grouping = Grouping.of(size, assignment)
        self.group_size = self._grouping.size
        self.group_assignment = assignment and [list(group) for group in assignment]

    def _set_kernel(self, activation: Any, nan_check: bool, save: str) -> None:
        """After the others, some of which exclude `save`."""
        self.activation = activation_function(activation, self._activations)
        self.nan_check = nan_check
        grouped_renorm = self.renorm and self._grouping != Grouping()
        self.save = checked_save(save, self.activation, self.virtual_batch_size, grouped_renorm)
        # XLA leaves assertions out. So `compile(jit_compile="auto")` does not choose it.
        self.supports_jit = not self.nan_check and save == "input"

    def _own_config(self) -> dict[str, Any]:
        """The arguments by name, as values that any file holds."""
        config = {name: getattr(self, name) for name in _PLAIN_ARGUMENTS}
        if self.activation is not None:
            config["activation"] = self.activation.__name__
        return config

    def _scheme(self) -> Scheme:
        return Scheme(
            self.epsilon,
            self._grouping,
            self.virtual_batch_size,
            self.activation,
            self.name if self.nan_check else None,
            self._kept_output(),
            self.axis_name,
            self.process_group,
        )

    def _kept_output(self) -> KeptOutput | None:
        if self.save == "input":
            return None
        return KeptOutput(self.name, negative_slope(self.activation))

    def _normalize_and_move(self, inputs: Any, axis: int, mask: Any, weights: Any) -> Any:
        """Outputs by the statistics of the global batch, which move the moving statistics.

        Args:
            inputs: a tensor in the dtype to normalize in, if that is a floating one.
            axis: that of the channels.
            mask: as `call` takes it.
            weights: as `call` takes them.
        """
        backend = _backends.get(keras.backend.backend())
        counts = element_weights(inputs, axis, mask, weights)
        if weights is not None:
            known = backend.known_value(counts)
            if known is not None:
                check_values(known, self.name)
        if not keras.backend.is_float_dtype(inputs.dtype):
            inputs = ops.cast(inputs, keras.backend.result_type(inputs.dtype, "float32"))
        batch = Batch(inputs, axis, counts, state_of(self))
        outputs, union = backend.normalize(
            batch, self._scheme(), functools.partial(affine_of, self)
        )
        self._follow(union)
        return outputs

    # How the moving statistics follow a batch; recalibration does something else with its moments.
    _follow = move_statistics


_PLAIN_ARGUMENTS = (
    "momentum",
    "renorm",
    "renorm_clipping",
    "renorm_momentum",
    "group_size",
    "group_assignment",
    "virtual_batch_size",
    "unbiased_moving_variance",
    "activation",
    "nan_check",
    "save",
)
