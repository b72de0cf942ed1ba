"""Where a call runs: on one part of a mapped batch, or on the whole of it, which may lie in parts.

Under `keras.distribution` an array inside `jit` is the whole batch, and XLA would make statistics
of it right by itself, with a collective for each of its sums. Here each device sums its own part
(`shard_map` over the axis of the batch) and all of them meet once, with everything in one payload.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from syncbn._backends.interface import Batch, Scheme
from syncbn._backends.jax.axes import manual_axes, mapped_axes
from syncbn._backends.jax.collectives import Replicas
from syncbn._backends.jax.values import is_concrete
from syncbn.errors import InputError
from syncbn.moments import Moments

__all__ = ["Place", "Stages"]


class Stages(NamedTuple):
    """The two functions that run on each replica, with gamma and beta made between them."""

    # (x, weights) -> the moments that normalize, and those of the union of all
    moments: Callable[[Any, Any | None], tuple[Moments, Moments]]
    # (x, weights, the moments that normalize, gamma, beta) -> y; differentiable by x, gamma, beta
    outputs: Callable[..., Any]


class Place(NamedTuple):
    """Who the replicas are, and how functions of one replica's part are run."""

    replicas: Replicas
    mesh: Any | None = None  # of the devices that the parts of a whole batch lie on

    @classmethod
    def of(cls, batch: Batch, scheme: Scheme) -> Place:
        """Where this call runs.

        Raises:
            NotSynchronizableError: an axis_name that is not bound.
            InputError: the groups are no partition of the replicas.
        """
        axes = mapped_axes(batch.inputs, scheme.axis_name, batch.state.values())
        if axes:
            count = jax.lax.axis_size(axes)
            return cls(Replicas(axes, count, scheme.grouping.over(count)))
        mesh, axis, count = _parts_of_batch()
        groups = scheme.grouping.over(count)
        by_parts = groups is not None or scheme.virtual_batch_size is not None
        divisible = _is_divisible(batch, count)
        if by_parts and count > 1 and not divisible:
            raise InputError(
                "Groups of replicas and virtual batches under keras.distribution require examples "
                f"on the first axis, in a number that the {count} devices of the batch divide. "
                f"Received: inputs.shape={tuple(batch.inputs.shape)}, axis={batch.axis}. Fill the "
                "batch up with examples of weight 0."
            )
        # Without `jit` it would be compiled anew in each call: only where results depend on it.
        if count == 1 or not divisible or not (by_parts or not is_concrete(batch.inputs)):
            return cls(Replicas())
        return cls(Replicas((axis,), count, groups), mesh)

    def moments(
        self, function: Callable[[Any, Any | None], tuple[Moments, Moments]], x: Any, weights: Any
    ) -> tuple[Moments, Moments]:
        """The first stage.

        Of parts of a whole batch the moments of groups come as tables with a row for each replica.
        """
        if self.mesh is None:
            return function(x, weights)
        grouped = self.replicas.groups is not None

        def of_part(x: Any, weights: Any) -> tuple[Moments, Moments]:
            own, union = function(x, weights)
            return Moments(*(_as_row(value) for value in own)) if grouped else own, union

        own_spec = self._parts if grouped else PartitionSpec()
        inputs = (self._parts, self._of_weights(x, weights))
        moments: tuple[Moments, Moments] = self._on_parts(
            of_part, inputs, (own_spec, PartitionSpec())
        )(x, weights)
        return moments

    def outputs(self, function: Callable[..., Any], x: Any, weights: Any, *vectors: Any) -> Any:
        """The second stage.

        Args:
            function: of x, the weights, and the vectors.
            x: this replica's part, or the whole batch.
            weights: of the elements, or None.
            *vectors: the moments, gamma and beta; of each the same on all replicas, or, of parts of
                a whole batch, a table with a row for each.
        """
        if self.mesh is None:
            return function(x, weights, *vectors)
        grouped = self.replicas.groups is not None

        def spec(vector: Any) -> Any:
            return self._parts if grouped and vector.ndim == 2 else PartitionSpec()

        def of_part(x: Any, weights: Any, *vectors: Any) -> Any:
            own = jax.tree.map(lambda v: v[0] if grouped and v.ndim == 2 else v, vectors)
            return function(x, weights, *own)

        specs = (self._parts, self._of_weights(x, weights), *jax.tree.map(spec, vectors))
        return self._on_parts(of_part, specs, self._parts)(x, weights, *vectors)

    @property
    def _parts(self) -> Any:
        return PartitionSpec(*self.replicas.axes)

    def _of_weights(self, x: Any, weights: Any) -> Any:
        """One weight for all examples is the same everywhere."""
        whole = weights is None or weights.shape[0] != x.shape[0]
        return PartitionSpec() if whole else self._parts

    def _on_parts(self, function: Callable[..., Any], inputs: Any, outputs: Any) -> Any:
        # The other axes of the mesh, over which variables may be split, stay XLA's.
        return jax.jit(
            jax.shard_map(
                function,
                mesh=self.mesh,
                in_specs=inputs,
                out_specs=outputs,
                axis_names={*self.replicas.axes},
            )
        )


def _as_row(value: Any) -> Any:
    return value.reshape(1, -1)


def _parts_of_batch() -> tuple[Any, Any, int]:
    """The mesh of Keras's distribution, its axis for the batch, and over how many devices that is.

    Without a distribution, or inside axes that are not the layer's: one device.
    """
    from keras import distribution

    active = distribution.distribution()
    name = getattr(active, "batch_dim_name", None)
    if name is None or manual_axes():
        return None, None, 1
    mesh = active.device_mesh.backend_mesh
    return mesh, name, int(mesh.shape[name])


def _is_divisible(batch: Batch, count: int) -> bool:
    """Whether each device holds as many examples as the others; they are on the first axis."""
    rank = batch.inputs.ndim
    return bool(batch.axis % rank > 0 and batch.inputs.shape[0] % count == 0)
