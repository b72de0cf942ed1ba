"""What a checkpoint does not say, or says otherwise than the model."""

from __future__ import annotations

from collections.abc import Sequence

from syncbn.checkpoints.matching import Pair
from syncbn.checkpoints.saved import Saved, base_and_number, snake_case
from syncbn.checkpoints.slots import is_batch_normalization

__all__ = ["notes_on"]

_OLD = "sync_batch_normalization"


def notes_on(saved: Saved, pairs: Sequence[Pair]) -> tuple[list[str], list[str]]:
    """Notes for the report, and those that are to be warnings.

    Keras 2 never wrote `synchronized` into a configuration: a layer that was made with it looks as
    any other. Weights without a configuration have at most the names that Keras gave by itself.
    """
    norms = [pair for pair in pairs if is_batch_normalization(pair.slot.layer)]
    if not norms:
        return [], []
    if saved.format.startswith("torch"):
        return _of_torch(norms)
    unknown = [pair for pair in norms if _synchronized(pair) is None]
    were = [pair for pair in norms if _synchronized(pair)]
    urgent = [*_lost(saved, unknown), *_local_now(were), *_other_arguments(norms)]
    notes = []
    if were:
        notes.append(f"{len(were)} layers were synchronized in the program that saved them.")
    return notes, urgent


def _synchronized(pair: Pair) -> bool | None:
    """Whether the layer was, by what the file says of it; None where it does not."""
    layer = pair.layer
    kind = snake_case(layer.class_name) if layer.class_name else None
    group = layer.address[-1] if layer.address else ""
    if layer.config is not None and "synchronized" in layer.config:
        return bool(layer.config["synchronized"])
    if _OLD in (kind, base_and_number(layer.name or "")[0], base_and_number(group)[0]):
        return True
    # Keras 3 has written `synchronized` since 3.0: only weights alone leave it open there.
    return None


def _lost(saved: Saved, unknown: list[Pair]) -> list[str]:
    if not unknown:
        return []
    version = saved.keras_version or ""
    writer = f"Keras {version}" if version else "the Keras that wrote it"
    if saved.has_config and version.startswith("2"):
        why = f"{writer} leaves `synchronized` out of every configuration"
    else:
        why = "a file of weights has none of their arguments"
    local = sum(not getattr(pair.slot.layer, "synchronized", False) for pair in unknown)
    now = f"In this model {len(unknown) - local} synchronize and {local} do not."
    return [
        f"The file cannot tell whether {len(unknown)} BatchNormalization layers were synchronized: "
        f"{why}. {now} Where they were, make the model with syncbn.SyncBatchNormalization."
    ]


def _local_now(were: list[Pair]) -> list[str]:
    local = [p.slot.path for p in were if not getattr(p.slot.layer, "synchronized", False)]
    if not local:
        return []
    return [
        f"{len(local)} layers were synchronized when they were saved and are not in this model: "
        f"{', '.join(local[:3])}{' …' if len(local) > 3 else ''}. Make it with "
        "syncbn.SyncBatchNormalization."
    ]


def _other_arguments(norms: list[Pair]) -> list[str]:
    """Outputs differ by epsilon and axis, which are no weights."""
    found: dict[str, list[str]] = {}
    for pair in norms:
        config = pair.layer.config or {}
        epsilon = config.get("epsilon")
        if epsilon is not None and float(epsilon) != float(pair.slot.layer.epsilon):
            text = f"epsilon was {float(epsilon):g}, is {float(pair.slot.layer.epsilon):g}"
            found.setdefault(text, []).append(pair.slot.path)
        momentum = config.get("momentum")
        now = pair.slot.layer.momentum
        if momentum is not None and (now is None or float(momentum) != float(now)):
            text = f"momentum was {float(momentum):g}, is {now}"
            found.setdefault(text, []).append(pair.slot.path)
    return [
        f"In {len(paths)} layers {text}: {', '.join(paths[:3])}{' …' if len(paths) > 3 else ''}."
        for text, paths in found.items()
    ]


def _of_torch(norms: list[Pair]) -> tuple[list[str], list[str]]:
    """What a `state_dict` of batch normalizations means other than Keras, and lacks."""
    notes = [
        f"The moving variances of {len(norms)} layers are torch's, unbiased: n / (n - 1) times "
        "Keras's. They are loaded as they are; unbiased_moving_variance=True goes on with them. "
        "torch's momentum is 1 - Keras's."
    ]
    default = [p.slot.path for p in norms if float(p.slot.layer.epsilon) == _KERAS_EPSILON]
    if not default:
        return notes, []
    return notes, [
        f"{len(default)} layers have Keras's default epsilon of {_KERAS_EPSILON:g}, where torch's "
        "is 1e-5, and a state_dict has none: outputs differ unless the modules were made with it: "
        f"{', '.join(default[:3])}{' …' if len(default) > 3 else ''}."
    ]


_KERAS_EPSILON = 1e-3
