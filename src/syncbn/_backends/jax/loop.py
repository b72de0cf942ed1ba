"""A training loop under `keras.distribution` that equals the loop on one device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from syncbn._backends.classifier import Batch, Loop

__all__ = ["ClassifierLoop"]


class ClassifierLoop(Loop):
    """Trains a classifier by a compiled step over the whole batch, which may lie in parts.

    A batch lies in equal parts on the devices. One that they do not divide, as the last of an epoch
    often is, JAX cannot lay out like that ("IndivisibleError"): it lies whole on every device, all
    of which compute the same, and the step is that of one device.

    Args:
        strategy: a `keras.distribution.DataParallel`, or None for one device.
        make_model: returns the built model; called in the strategy's scope.
        make_optimizer: returns a new Keras optimizer; likewise.
    """

    def __init__(
        self, strategy: Any, make_model: Callable[[], Any], make_optimizer: Callable[[], Any]
    ) -> None:
        self._strategy = strategy
        self._mesh = None if strategy is None else strategy.device_mesh.backend_mesh
        with _distributed_by(strategy):
            self.model = make_model()
            self._optimizer = make_optimizer()
            self._optimizer.build(self.model.trainable_variables)
        kinds = (self.model.trainable_variables, self.model.non_trainable_variables)
        # The model's own variables follow in `weights()`: Keras takes long to assign.
        self._state: Any = [[v.value for v in kind] for kind in (*kinds, self._optimizer.variables)]
        everywhere = None if strategy is None else NamedSharding(self._mesh, PartitionSpec())
        self._step = jax.jit(self._whole_step, out_shardings=everywhere, donate_argnums=0)
        self._infer = jax.jit(
            lambda trainable, rest, x: self.model.stateless_call(trainable, rest, x, training=False)
        )

    def step(self, batch: Batch, size: int) -> tuple[float, float]:
        """One step of the optimizer; the sums over the batch of losses and of right answers."""
        in_parts = self._mesh is not None and size % self._mesh.size == 0
        # What is traced for a batch that lies whole on every device is one device's step.
        with _distributed_by(self._strategy if in_parts else None):
            self._state, sums = self._step(self._state, *self._laid_out(batch.x, batch.y, in_parts))
        losses, hits = np.asarray(sums)
        return float(losses), float(hits)

    def _laid_out(self, x: Any, y: Any, in_parts: bool) -> tuple[Any, Any]:
        if self._mesh is None:
            return x, y
        parts = PartitionSpec(self._strategy.batch_dim_name) if in_parts else PartitionSpec()
        placed: tuple[Any, Any] = jax.device_put((x, y), NamedSharding(self._mesh, parts))
        return placed

    def _whole_step(self, state: Any, x: Any, y: Any) -> tuple[Any, Any]:
        trainable, rest, optimizer_state = state

        def objective(trainable: Any) -> tuple[Any, Any]:
            probabilities, moved = self.model.stateless_call(trainable, rest, x, training=True)
            losses = keras.losses.sparse_categorical_crossentropy(y, probabilities)
            total = jnp.sum(losses)
            mapping = list(zip(self._optimizer.variables, optimizer_state, strict=True))
            with keras.StatelessScope(state_mapping=mapping):
                scaled = self._optimizer.scale_loss(total / len(x))
            hits = jnp.sum(jnp.argmax(probabilities, axis=-1) == y)
            return scaled, (moved, jnp.stack([total, hits.astype(total.dtype)]))

        gradients, (moved, sums) = jax.grad(objective, has_aux=True)(trainable)
        trainable, optimizer_state = self._optimizer.stateless_apply(
            optimizer_state, gradients, trainable
        )
        return [trainable, moved, optimizer_state], sums

    def infer(self, x: Any) -> Any:
        """Probabilities in inference, on the first of the devices."""
        trainable, rest, _ = jax.tree.map(_on_first_device, self._state)
        with _distributed_by(None):
            probabilities, _ = self._infer(trainable, rest, x)
        return np.asarray(probabilities)

    def weights(self) -> list[Any]:
        """A copy of the model's weights, in Keras's order."""
        kinds = (self.model.trainable_variables, self.model.non_trainable_variables)
        for variables, values in zip(kinds, self._state[:2], strict=True):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(jnp.copy(value))  # the next step overwrites its own
        return super().weights()


def _on_first_device(array: Any) -> Any:
    """An array that every device has a copy of."""
    return array.addressable_data(0)


@contextmanager
def _distributed_by(strategy: Any) -> Iterator[None]:
    """Keras's distribution within; also none, whatever the user has set."""
    before = keras.distribution.distribution()
    keras.distribution.set_distribution(strategy)
    try:
        yield
    finally:
        keras.distribution.set_distribution(before)
