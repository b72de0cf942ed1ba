"""fold(model): the same model for inference, with fewer layers."""

from __future__ import annotations

import sys
from typing import Any

from syncbn.folding.plan import targets_of
from syncbn.folding.rebuild import Rebuilding

__all__ = ["fold"]


def fold(model: Any, *, verbose: bool = True) -> Any:
    """A model for inference, with batch normalizations folded into the layers before them.

    A dense layer or convolution W·x + b and the normalization behind it are one such layer:

        W' = W · gamma / √(moving_variance + epsilon)
        b' = (b − moving_mean) · gamma / √(moving_variance + epsilon) + beta

    a channel each, computed in float64 and rounded once to the dtype of the variables. An
    `activation` inside of a SyncBatchNormalization becomes the layer's. It holds for
    `BatchNormalization` and `SyncBatchNormalization` behind Keras's Dense, EinsumDense, Conv,
    ConvTranspose, DepthwiseConv and SeparableConv layers, in `TimeDistributed` too, and inside of
    models that are called as layers. What cannot be folded stays and computes what it did;
    `plan_folding(model)` lists it with the reasons, as data.

    The given model is not touched. The new one is a plain functional or Sequential model, not
    compiled, whose other layers are made anew from their configurations with the same names and
    weights; inputs and outputs keep names, structure and order. Kernels carry no constraints and
    regularizers any more: train the model that was given, and fold it again.

    Args:
        model: a functional or Sequential model that is built. A subclass with a `call` of its own
            decides its dataflow itself, and is refused; as a layer inside of a model it is kept.
        verbose: say in one line on stderr what was folded and what was left.

    Returns:
        The new model. Outputs in inference are those of the given one, but for rounding.

    Raises:
        InputError: no model whose dataflow Keras knows; a layer that cannot be made anew from its
            configuration.

    References:
        Jacob et al., "Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference", CVPR 2018, arXiv:1712.05877 (section 3.2).
    """
    targets, plan = targets_of(model)
    result = Rebuilding(targets).of(model)
    if verbose:
        print(f"syncbn: {plan}", file=sys.stderr)  # noqa: T201
    return result
