"""Where NaN and infinity come from: which replica, and its input or the layer's own variables."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch

from syncbn._backends.torch import collectives
from syncbn._backends.torch.collectives import Replicas
from syncbn.errors import InputError
from syncbn.groups import Groups
from syncbn.moments import Moments

__all__ = ["exchange", "outside_of_compilation"]

# What a replica tells the others, as a number: the sum of those that hold.
_ORIGINS = ("", "its input", "the state of the layer", "its input and the state of the layer")


def outside_of_compilation(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as one that torch.compile leaves alone: it can stop training with an error.

    Where a graph may have breaks, one is here. With `fullgraph=True` torch refuses to compile, in
    an error of its own with this reason; what is raised while it traces is lost in Keras's handler
    of errors, which it cannot trace.
    """
    # Before torch 2.7 it takes none.
    known = "reason" in inspect.signature(torch.compiler.disable).parameters
    return cast(
        "Callable[..., Any]",
        torch.compiler.disable(function, **({"reason": _NOT_COMPILED} if known else {})),
    )


_NOT_COMPILED = (
    "nan_check=True and save='output' of a SyncBatchNormalization require that torch does not "
    "compile them, for they stop with an error. Received: torch.compile with fullgraph=True. Take "
    "fullgraph=False, where the layer runs outside of the graph; nan_check=False, save='input'."
)


def exchange(
    local: Moments,
    replicas: Replicas,
    groups: Groups | None,
    state: Mapping[str, Any],
    layer: str | None,
) -> tuple[Moments, Moments]:
    """The moments of the group and of all replicas; with a layer's name, if all is finite.

    Every replica tells the others in the collective that it takes part in anyway, so that all of
    them stop here with the same words, and none waits for one that has stopped.

    Args:
        local: moments of this replica's part.
        replicas: who takes part.
        groups: who normalizes together.
        state: the layer's variables.
        layer: its name, or None for no check.

    Raises:
        InputError: with the layer, the replicas and the origin.
    """
    if layer is None:
        exchanged = collectives.exchange(local, replicas, groups)
        return exchanged.own, exchanged.union
    own, union = _checked(local, replicas, groups, state, layer)
    return own, union


@outside_of_compilation
def _checked(
    local: Moments,
    replicas: Replicas,
    groups: Groups | None,
    state: Mapping[str, Any],
    layer: str,
) -> tuple[Moments, Moments]:
    fault = _not_finite(local) + 2 * _not_finite(state.values())
    exchanged = collectives.exchange(local, replicas, groups, torch.as_tensor(fault).to(local.mean))
    assert exchanged.faults is not None
    faults = [int(number) for number in exchanged.faults.tolist()]
    if any(faults):
        raise InputError(_report(faults, layer))
    return exchanged.own, exchanged.union


def _not_finite(values: Iterable[Any]) -> int:
    """1 if any number of the values is NaN or infinite, else 0."""
    return int(not all(bool(torch.isfinite(value).all()) for value in values))


def _report(faults: list[int], layer: str) -> str:
    """Which replica found what."""
    found = "; ".join(
        f"replica {replica}: {_ORIGINS[fault]}" for replica, fault in enumerate(faults) if fault
    )
    return (
        f"Layer {layer} with nan_check=True requires finite numbers. Received: NaN or infinity in "
        f"{found}. This call has updated nothing, and no gradient leaves the step; layers before "
        "may have moved their statistics. If it is the input, or overflows when it is squared, "
        "look at the data and the layers before; if it is the state, restore a checkpoint."
    )
