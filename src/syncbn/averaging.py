"""Keras's `fit` by several processes of torch, of which it does not know."""

from __future__ import annotations

from typing import Any

import keras

from syncbn.errors import NotSynchronizableError

__all__ = ["average_gradients"]


def average_gradients(model: Any, process_group: Any = None) -> None:
    """Make `fit` and `evaluate` of all processes one training, by the mean over their examples.

    In every step the gradient is that of `Σ_r n_r · loss_r / Σ_r n_r`, where loss_r is the mean
    over the n_r examples of process r: of the mean over the examples of all processes, also where
    they hold different numbers, or none. Each loss is scaled before the backward pass, in which
    synchronized layers add up what the processes' losses say. One all-reduce a step for the number
    of examples, and one for all gradients of a dtype. Weights and the optimizer's state start as
    those of the first process. Logs at the end of an epoch and of `evaluate` are by the metrics of
    all processes together, so that callbacks decide alike everywhere; those of a single batch are a
    process's own, and no callback must stop the training by them (`TerminateOnNaN` does).

    Prefer `torch.nn.parallel.DistributedDataParallel` in a training loop of your own: it overlaps
    communication with the backward pass. Keras's `fit` does not call it.

    Every process calls `fit` and `evaluate` alike, feeds its own part of the data, and has as many
    batches as the others. Dropout draws by each process's own seed.

    Args:
        model: built and compiled; Keras on torch. The loss is a mean over examples
            (`reduction="sum_over_batch_size"`, Keras's default), of outputs without a mask; the
            state of a metric is sums, as of all of Keras's.
        process_group: of `torch.distributed`; None for all processes.

    Raises:
        NotSynchronizableError: Keras runs on something else, there is no process group, or this
            process is not of it.
        InputError: the model is not built, not compiled, or its loss is no mean over examples; in
            `fit`, it has been compiled anew, or an output has a mask.
        WorkerError: in `fit` and `evaluate`, another process is gone, late, or has fewer batches.

    References:
        Goyal et al., "Accurate, Large Minibatch SGD", arXiv:1706.02677, 2017 (section 3: losses are
        normalized by the size of the whole minibatch, not by each worker's).
    """
    if keras.backend.backend() != "torch":
        raise NotSynchronizableError(
            "average_gradients requires Keras on torch. Received: keras.backend.backend()="
            f"{keras.backend.backend()!r}. On TensorFlow take a tf.distribute strategy, on JAX "
            "keras.distribution."
        )
    from syncbn._backends.torch import gradients

    gradients.average_gradients(model, process_group)
