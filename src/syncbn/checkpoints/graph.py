"""TensorFlow's checkpoints: `save_weights("ckpt")`, `tf.train.Checkpoint`, SavedModel."""

from __future__ import annotations

import re
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from syncbn.checkpoints.saved import Saved, SavedLayer, leaf_name
from syncbn.errors import InputError

__all__ = ["prefix_of", "read_graph"]

# Edges of the graph of objects that lead to other things than layers, or to the same once more.
_NOT_LAYERS = frozenset(
    {
        *("variables", "trainable_variables", "non_trainable_variables", "regularization_losses"),
        *("keras_api", "signatures", "optimizer", "_optimizer", "metrics", "compiled_metrics"),
        *("losses", "loss", "compiled_loss", "save_counter", "_compile_metrics"),
    }
)
_UNWEIGHTED = re.compile(r"layer-\d+")  # each with weights is a `layer_with_weights-…` too
_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"


def prefix_of(path: Path) -> str | None:
    """What TensorFlow calls the checkpoint at a path: of a folder the latest, or a SavedModel's."""
    if Path(f"{path}.index").is_file():
        return str(path)
    if path.suffix == ".index" and path.is_file():
        return str(path.with_suffix(""))
    if (path / "variables" / "variables.index").is_file():
        return str(path / "variables" / "variables")
    if (path / "checkpoint").is_file():
        return _tensorflow().train.latest_checkpoint(str(path)) or None
    return None


def _tensorflow() -> Any:
    try:
        import tensorflow as tf
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "A checkpoint of TensorFlow requires the package tensorflow to be read, whatever Keras "
            "runs on. Received: no such package. Install it: pip install 'syncbn[tensorflow]'; or "
            "save the weights as HDF5 where it is.",
            name="tensorflow",
        ) from error
    return tf


def read_graph(prefix: str, part: str | None) -> tuple[Saved, ...]:
    """The models that a checkpoint may hold: itself, and each object of a `tf.train.Checkpoint`.

    Args:
        prefix: the path without `.index`.
        part: the name of the object in the `tf.train.Checkpoint`, `model` of `model=…`, or None.

    Raises:
        InputError: a checkpoint by name, without a graph of objects; no such part.
    """
    tf = _tensorflow()
    from tensorflow.core.protobuf import trackable_object_graph_pb2

    try:
        reader = tf.train.load_checkpoint(prefix)
    except (tf.errors.OpError, ValueError) as error:
        raise InputError(
            "load_weights requires a TensorFlow checkpoint that can be read. Received: "
            f"{prefix!r}: {error}. Give its path without .index, with all its files beside it."
        ) from error
    if not reader.has_tensor(_GRAPH):
        raise InputError(
            "load_weights requires a checkpoint of objects, as TensorFlow 2 writes it. Received: "
            f"{prefix!r}, which has variables by name alone. Load it by tf.compat.v1 and save it "
            "anew."
        )
    graph = trackable_object_graph_pb2.TrackableObjectGraph.FromString(reader.get_tensor(_GRAPH))
    parts = {c.local_name: c.node_id for c in graph.nodes[0].children}
    if part is not None and part not in parts:
        raise InputError(
            f"`part` requires the name of an object in the checkpoint. Received: {part!r}. There "
            f"are: {sorted(parts)[:10]}."
        )
    whole = {} if part is not None else {"": 0}
    whole |= {
        name: node
        for name, node in parts.items()
        if node
        and part in (None, name)
        and name not in _NOT_LAYERS
        and not _UNWEIGHTED.fullmatch(name)
    }
    read = (_read(graph, reader, name, node) for name, node in whole.items())
    return tuple(saved for saved in read if saved.layers)


def _read(graph: Any, reader: Any, part: str, root: int) -> Saved:
    layers: list[SavedLayer] = []
    loaded: set[str] = set()
    queue: deque[tuple[int, tuple[str, ...]]] = deque([(root, ())])
    seen = {root}
    while queue:
        number, address = queue.popleft()
        arrays: dict[str, np.ndarray] = {}
        full_name = ""
        for edge in graph.nodes[number].children:
            skipped = edge.local_name in _NOT_LAYERS or _UNWEIGHTED.fullmatch(edge.local_name)
            attributes = graph.nodes[edge.node_id].attributes
            if attributes and not skipped:
                key = attributes[0].checkpoint_key
                arrays[leaf_name(edge.local_name)] = np.asarray(reader.get_tensor(key))
                full_name = attributes[0].full_name
                loaded.add(key)
            elif not skipped and edge.node_id not in seen:
                seen.add(edge.node_id)
                queue.append((edge.node_id, (*address, edge.local_name)))
        if arrays:
            path = "/".join(x for x in (part, *address) if x) or "(root)"
            parents = full_name.split("/")[:-1]
            layers.append(
                SavedLayer(path, arrays, parents[-1] if parents else None, address=address)
            )
    others = [key for key in reader.get_variable_to_shape_map() if key not in loaded | {_GRAPH}]
    return Saved(
        "TensorFlow checkpoint",
        tuple(layers),
        ordered=False,
        left_out=_summary(others),
    )


def _summary(keys: list[str]) -> tuple[str, ...]:
    """What is not of the model, by the object it belongs to."""
    counts: dict[str, int] = {}
    for key in keys:
        slot = re.search(r"/\.OPTIMIZER_SLOT/(\w+)/", key)
        owner = slot[1] if slot else key.split("/")[0]
        counts[owner] = counts.get(owner, 0) + 1
    return tuple(f"{owner}: {number} arrays" for owner, number in sorted(counts.items()))
