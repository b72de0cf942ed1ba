"""Where NaN and infinity come from: which replica, and its input or the layer's own variables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from syncbn._backends.torch import collectives
from syncbn._backends.torch.collectives import Replicas
from syncbn.errors import InputError, UnsupportedFeatureError
from syncbn.groups import Groups
from syncbn.moments import Moments

__all__ = ["exchange", "refuse_compilation"]

# What a replica tells the others, as a number: the sum of those that hold.
_ORIGINS = ("", "its input", "the state of the layer", "its input and the state of the layer")


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
        UnsupportedFeatureError: torch compiles this, and cannot stop in it.
    """
    if layer is None:
        exchanged = collectives.exchange(local, replicas, groups)
        return exchanged.own, exchanged.union
    refuse_compilation(layer, "nan_check=True", "while you look for the NaN")
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


def refuse_compilation(layer: str, argument: str, otherwise: str) -> None:
    """Make sure that torch does not compile what runs now: it could not stop in the middle.

    Args:
        layer: its name.
        argument: of the layer, that needs to stop.
        otherwise: how the advice not to compile goes on.

    Raises:
        UnsupportedFeatureError: it does.
    """
    if torch.compiler.is_compiling():
        raise UnsupportedFeatureError(
            f"Layer {layer!r} with {argument} requires that torch does not compile it. Received: "
            "a call inside torch.compile. Compile the model with jit_compile=False, or not at all, "
            f"{otherwise}."
        )
