"""What was recorded of a step: NumPy alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

__all__ = ["LayerCall", "Step", "Structure", "Variable"]


class Variable(NamedTuple):
    """A variable of the model or of its optimizer."""

    path: str
    layer: str  # path of the layer that owns it; "" for none
    trainable: bool
    kind: str  # "weight", "state", "seed" or "optimizer"


class LayerCall(NamedTuple):
    """A call of a layer within a train step, and what is to be known of the layer.

    Attributes:
        key: path of the layer, and which call of it.
        class_name: with the package before it where it is Keras's or ours.
        dtype: in which it computes.
        random: whether it draws random numbers.
        normalization: of a batch normalization, what its formula needs; else None.
    """

    key: str
    class_name: str
    dtype: str
    random: bool = False
    normalization: dict[str, Any] | None = None


class Structure(NamedTuple):
    """What a model is made of, the same for every build of it but for names.

    Attributes:
        name: of the model.
        calls: of layers, in the order in which the step makes them.
        variables: in an order that two builds have in common.
    """

    name: str
    calls: tuple[LayerCall, ...]
    variables: tuple[Variable, ...]

    @property
    def keys(self) -> list[str]:
        """Of the calls."""
        return [call.key for call in self.calls]

    @property
    def compared(self) -> list[Variable]:
        """Those whose values after the step are recorded; the optimizer's come behind them."""
        return [variable for variable in self.variables if variable.kind != "optimizer"]

    @property
    def trainable(self) -> list[Variable]:
        """In the order of the gradients."""
        return [variable for variable in self.variables if variable.trainable]


@dataclass
class Step:
    """One step of training on one or more replicas, by the number of the replica.

    Attributes:
        outputs: by call and replica, the flat tensors that it returned.
        inputs: of batch normalizations, by call and replica: inputs, mask, weights.
        data: the flat tensors of the part of the batch.
        losses: those that the step computed, as it computed them.
        gradients: by number of the trainable variable, as the optimizer was given them.
        after: all variables after the step but the optimizer's.
        logs: what Keras reports of the step.
    """

    outputs: dict[tuple[str, int], list[Any]] = field(default_factory=dict)
    inputs: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    data: dict[int, list[Any]] = field(default_factory=dict)
    losses: dict[int, list[float]] = field(default_factory=dict)
    gradients: dict[int, dict[int, Any]] = field(default_factory=dict)
    after: dict[int, list[Any]] = field(default_factory=dict)
    logs: dict[str, float] = field(default_factory=dict)
