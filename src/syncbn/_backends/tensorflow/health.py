"""Where NaN and infinity come from: which replica, and its input or the layer's own variables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from syncbn._backends.tensorflow import collectives
from syncbn.errors import UnsupportedFeatureError
from syncbn.groups import Groups
from syncbn.moments import Moments

__all__ = ["exchange", "refuse_xla"]

# What a replica tells the others, as a number: the sum of those that hold. Without quotes, here and
# below, which an assertion in a graph would print with backslashes.
_ORIGINS = ("", "its input", "the state of the layer", "its input and the state of the layer")


def exchange(
    local: Moments, groups: Groups | None, state: Mapping[str, Any], layer: str | None
) -> tuple[Moments, Moments]:
    """The moments of the group and of all replicas; with a layer's name, if all is finite.

    Every replica tells the others in the collective that it takes part in anyway, so that all of
    them stop here with the same words, and none waits for one that has stopped.

    Args:
        local: moments of this replica's part.
        groups: who normalizes together.
        state: the layer's variables.
        layer: its name, or None for no check.

    Raises:
        InvalidArgumentError: from TensorFlow, with the layer, the replicas and the origin.
        UnsupportedFeatureError: XLA compiles this, and would leave the check out.
    """
    if layer is None:
        exchanged = collectives.exchange(local, groups)
        return exchanged.own, exchanged.union
    refuse_xla(layer, "nan_check=True", "while you look for the NaN")
    fault = _not_finite(local) + 2 * _not_finite(state.values())
    exchanged = collectives.exchange(local, groups, tf.cast(fault, collectives.moments_dtype()))
    faults = tf.cast(exchanged.faults, tf.int32)
    check = tf.debugging.Assert(tf.reduce_all(faults == 0), [_report(faults, layer)])
    # Nothing goes on, to the outputs or to the moving statistics, before the check.
    with tf.control_dependencies([] if check is None else [check]):
        return _as_they_are(exchanged.own), _as_they_are(exchanged.union)


def _as_they_are(moments: Moments) -> Moments:
    return Moments(*(tf.identity(part) for part in moments))


def _not_finite(values: Any) -> Any:
    """1 if any number of the values is NaN or infinite, else 0."""
    finite = [tf.reduce_all(tf.math.is_finite(tf.convert_to_tensor(value))) for value in values]
    return 1 - tf.cast(tf.reduce_all(finite), tf.int32)


def _report(faults: Any, layer: str) -> Any:
    """Which replica found what, as a string tensor."""
    replicas = tf.where(faults > 0)[:, 0]
    origins = tf.gather(tf.constant(_ORIGINS), tf.gather(faults, replicas))
    found = tf.strings.join(["replica ", tf.strings.as_string(replicas), ": ", origins])
    return tf.strings.join(
        [
            f"Layer {layer} with nan_check=True requires finite numbers. "
            "Received: NaN or infinity in ",
            tf.strings.reduce_join(found, separator="; "),
            ". This call has updated nothing, and no gradient leaves the step; layers before may "
            "have moved their statistics. If it is the input, or overflows when it is squared, "
            "look at the data and the layers before; if it is the state, restore a checkpoint.",
        ]
    )


def refuse_xla(layer: str, argument: str, otherwise: str) -> None:
    """Make sure that XLA does not compile what is traced now: assertions would go.

    Args:
        layer: its name.
        argument: of the layer, that needs assertions.
        otherwise: how the advice to compile without XLA goes on.

    Raises:
        UnsupportedFeatureError: it does.
    """
    from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

    if GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
        raise UnsupportedFeatureError(
            f"Layer {layer!r} with {argument} requires a graph that XLA does not compile: it "
            "leaves assertions out. Received: a call inside jit_compile=True. Compile the model "
            f"with jit_compile=False {otherwise}."
        )
