"""BatchNormalization into SyncBatchNormalization and back, in any model, in place."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from syncbn.conversion.arguments import TO_PLAIN, TO_SYNCHRONIZED
from syncbn.conversion.in_place import forget_compiled, switch
from syncbn.conversion.plan import ConversionPlan, Custom, Left, Replacement, plan
from syncbn.errors import InputError

__all__ = [
    "ConversionPlan",
    "Custom",
    "Left",
    "Replacement",
    "convert",
    "plan_conversion",
    "revert",
    "reverted",
]


def convert(
    model: Any, *, custom: Custom | None = None, verbose: bool = True, **arguments: Any
) -> Any:
    """Make every `keras.layers.BatchNormalization` of a model synchronized, in place.

    Each layer stays the object it is and changes its class: names, variables and their values,
    `trainable`, dtype policies, regularizers, constraints, initializers, sharing, wrappers
    (`TimeDistributed`), lists and dictionaries, the optimizer with its slots and the compiled loss
    and metrics are what they were, and training goes on. Inference gives the same bits. Steps are
    traced anew. Under a `tf.distribute` strategy make the model in its scope, as ever.

    Args:
        model: any model or layer of Keras 3, functional, Sequential or subclassed, built or not.
            Where it is part of another model that is compiled, give that one.
        custom: `f(layer)` for a subclass of BatchNormalization: returns a new, unbuilt
            SyncBatchNormalization (or a subclass) with the same axis, scale, center and renorm,
            whose class and arguments the layer takes over; or None. By default such layers are
            left as they are, and reported.
        verbose: say in one line on stderr what was done.
        **arguments: set on every new layer: group_size, group_assignment, virtual_batch_size,
            unbiased_moving_variance, nan_check, save, axis_name, process_group, momentum, epsilon.

    Returns:
        The same model.

    Raises:
        InputError: no model of Keras 3; an argument that cannot be set; a `custom` that gives
            something else. The model is then what it was.

    References:
        torch, `torch.nn.SyncBatchNorm.convert_sync_batchnorm`, which makes new modules instead.
    """
    return _converted(model, TO_SYNCHRONIZED, custom, verbose, arguments)


def revert(
    model: Any, *, custom: Custom | None = None, verbose: bool = True, **arguments: Any
) -> Any:
    """Make every `SyncBatchNormalization` of a model Keras's `BatchNormalization`, in place.

    The reverse of `convert`, with all that it keeps; inference gives the same bits, and the model
    is saved as one that needs no syncbn. What Keras's layer does not have is lost, and said:
    groups, virtual batches, `unbiased_moving_variance`, `nan_check`, `save`; `momentum=None`
    becomes Keras's default.

    Args:
        model: any model or layer of Keras 3.
        custom: as in `convert`, for subclasses of SyncBatchNormalization; it returns a
            BatchNormalization.
        verbose: say in one line on stderr what was done.
        **arguments: set on every new layer: momentum, epsilon, synchronized.

    Returns:
        The same model.

    Raises:
        InputError: as `convert`; a layer with an activation inside, or called with `weights=`,
            which Keras's cannot do. The model is then what it was.

    References:
        Asked for of torch since 2020 (pytorch issue 41081); Keras 3, `BatchNormalization`.
    """
    return _converted(model, TO_PLAIN, custom, verbose, arguments)


def plan_conversion(
    model: Any, *, to_plain: bool = False, custom: Custom | None = None, **arguments: Any
) -> ConversionPlan:
    """What `convert`, or with `to_plain` `revert`, would do with these arguments, as data.

    Nothing is changed. `plan.replaced` and `plan.left` have a layer each, with its path and, where
    it is left, the reason; `plan.as_dict()` is for JSON, `str(plan)` the line that `convert` says.

    Args:
        model: any model or layer of Keras 3.
        to_plain: what `revert` would do, in place of `convert`.
        custom: as in `convert`, or in `revert`.
        **arguments: as in `convert`, or in `revert`.

    Returns:
        The plan, whose names are those of the model's layers.

    Raises:
        InputError: as `convert`, but for layers that `revert` refuses, which are in `left`.

    References:
        As `convert`.
    """
    return plan(model, TO_PLAIN if to_plain else TO_SYNCHRONIZED, custom, arguments)


@contextlib.contextmanager
def reverted(model: Any, custom: Custom | None = None) -> Iterator[Any]:
    """The model with Keras's layers for the length of a block, as to save it.

    Steps that are compiled stay so: do not train inside. Not for several threads.

    Args:
        model: any model or layer of Keras 3.
        custom: as in `revert`.

    Yields:
        The same model.

    Raises:
        InputError: as `revert`.

    References:
        As `revert`.
    """
    with switch(_checked(plan(model, TO_PLAIN, custom, {})).replaced):
        yield model


def _converted(
    model: Any, direction: Any, custom: Custom | None, verbose: bool, arguments: dict[str, Any]
) -> Any:
    planned = _checked(plan(model, direction, custom, arguments))
    undo = switch(planned.replaced)
    try:
        forget_compiled(model)
    except BaseException:
        undo.close()
        raise
    if verbose:
        print(f"syncbn: {planned}", file=sys.stderr)  # noqa: T201
    return model


def _checked(planned: ConversionPlan) -> ConversionPlan:
    stopping = [one for one in planned.left if one.stops]
    if stopping:
        first = ", ".join(f"{one.path}: {one.reason}" for one in stopping[:3])
        raise InputError(
            f"Conversion to {planned.goal} requires layers that it can be made of. Received: "
            f"{len(stopping)} that cannot, as {first}. Make the model with a layer of its own for "
            "what Keras's does not have, and copy the weights."
        )
    return planned
