"""The batch normalizations of a step, as their formula takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from syncbn.groups import Grouping
from syncbn.verification.aligning import Parts
from syncbn.verification.measuring import Sharing
from syncbn.verification.normalization import Normalization
from syncbn.verification.recording import LayerCall, Step, Structure

__all__ = ["normalizations"]


def normalizations(
    structure: Structure, step: Step, parts: Parts, sharing: Sharing
) -> Iterator[tuple[LayerCall, Normalization]]:
    """Each call of one that normalized by its batch, and whose formula is known.

    Args:
        structure: of the model that made the step.
        step: what was recorded.
        parts: who held which examples.
        sharing: how the replicas share.
    """
    for call in structure.calls:
        if call.normalization is None:
            continue
        seen = {
            replica: inputs for (key, replica), inputs in step.inputs.items() if key == call.key
        }
        outputs = {
            replica: values[0]
            for (key, replica), values in step.outputs.items()
            if key == call.key and replica in seen
        }
        if seen and seen.keys() == outputs.keys():
            found = _normalization(call.normalization, seen, outputs, parts, sharing)
            if found is not None:
                yield call, found


def _normalization(
    of_layer: dict[str, Any],
    seen: dict[int, dict[str, Any]],
    outputs: dict[int, Any],
    parts: Parts,
    sharing: Sharing,
) -> Normalization | None:
    if sharing.shared:
        seen, outputs = _split(seen[0], outputs[0], parts)
    # An empty part has no statistics, and TensorFlow's oneDNN gives it the shape of another layer.
    seen = {replica: one for replica, one in seen.items() if np.size(one["inputs"])}
    if not seen:
        return None
    outputs = {replica: outputs[replica] for replica in seen}
    first = seen[min(seen)]
    axis = of_layer["axis"]
    x = {replica: np.moveaxis(one["inputs"], axis, -1) for replica, one in seen.items()}
    channels = x[min(x)].shape[-1]
    counts = {}
    for replica, one in seen.items():
        of_elements = np.ones(x[replica].shape[:-1])
        for name in ("mask", "weights"):
            if name in one:
                factor = _broadcast(np.asarray(one[name], np.float64), of_elements.shape)
                if factor is None:
                    return None
                of_elements = of_elements * factor
        counts[replica] = of_elements
    return Normalization(
        # What is masked may be anything, NaN too.
        parts={replica: _defined(value, counts[replica]) for replica, value in x.items()},
        counts=counts,
        outputs={replica: np.moveaxis(value, axis, -1) for replica, value in outputs.items()},
        gamma=np.asarray(first.get("gamma", np.ones(channels)), np.float64),
        beta=np.asarray(first.get("beta", np.zeros(channels)), np.float64),
        epsilon=of_layer["epsilon"],
        activation=_activation(of_layer["activation"]),
        groups=Grouping.of(of_layer["group_size"], of_layer["group_assignment"]).over(
            sharing.replicas
        ),
        has_mask=any("mask" in one for one in seen.values()),
    )


def _defined(value: Any, counts: Any) -> Any:
    value = np.asarray(value, np.float64)
    return np.where(np.isfinite(value) | (counts[..., None] > 0), value, 0.0)


def _broadcast(factor: Any, shape: tuple[int, ...]) -> Any | None:
    """A mask or weights over all elements: as they are, of each example, or one for all."""
    factor = factor.reshape(factor.shape + (1,) * (len(shape) - factor.ndim))
    if factor.ndim > len(shape) and factor.shape[-1] == 1:
        factor = factor[..., 0]
    try:
        return np.broadcast_to(factor, shape)
    except ValueError:
        return None


def _split(
    seen: dict[str, Any], outputs: Any, parts: Parts
) -> tuple[dict[int, dict[str, Any]], dict[int, Any]]:
    """One process's arrays as the replicas hold them."""
    size = parts.size
    split_inputs: dict[int, dict[str, Any]] = {}
    split_outputs: dict[int, Any] = {}
    for replica, rows in parts.rows.items():
        if not len(rows):
            continue
        split_inputs[replica] = {
            name: value
            if name in {"gamma", "beta"} or not np.ndim(value) or len(value) != size
            else value[rows]
            for name, value in seen.items()
        }
        split_outputs[replica] = outputs[rows]
    return split_inputs, split_outputs


def _activation(serialized: Any) -> Callable[[Any], Any] | None:
    if serialized is None:
        return None
    function = keras.activations.get(serialized)

    def apply(values: Any) -> Any:
        return keras.ops.convert_to_numpy(function(keras.ops.convert_to_tensor(values)))

    return apply
