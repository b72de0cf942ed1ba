"""A training loop over the processes of torch.distributed that equals the loop on one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import torch
from keras import ops
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from syncbn._backends.classifier import Batch, Loop, part_of
from syncbn.errors import WorkerError

__all__ = ["ClassifierLoop"]


class ClassifierLoop(Loop):
    """Trains a classifier under DistributedDataParallel, and evaluates it in this process.

    Args:
        strategy: a process group, or None for this process alone.
        make_model: returns the built model.
        make_optimizer: returns a new Keras optimizer.
    """

    def __init__(
        self, strategy: Any, make_model: Callable[[], Any], make_optimizer: Callable[[], Any]
    ) -> None:
        self._group = strategy
        self.model = make_model()
        self._optimizer = make_optimizer()
        self._optimizer.build(self.model.trainable_variables)
        self._replicas = 1 if strategy is None else distributed.get_world_size(strategy)
        self._call: Any = self.model
        if strategy is not None:
            self._call = DistributedDataParallel(self.model, process_group=strategy)
            # A lambda: torch refuses annotations that it does not know, as strings.
            self._call.register_comm_hook(strategy, lambda group, bucket: _summed(group, bucket))

    def step(self, batch: Batch, size: int) -> tuple[float, float]:
        """One step of the optimizer; the sums over the batch of losses and of right answers."""
        start, end = 0, size
        if self._group is not None:
            rank = distributed.get_rank(self._group)
            start, end = part_of(batch.full_size, rank, self._replicas)
        x, y = (ops.convert_to_tensor(part[start:end]) for part in (batch.x, batch.y))
        try:
            sums = self._step(x, y, size)
        except RuntimeError as error:
            if self._group is None or "gloo" not in str(error):
                raise
            raise WorkerError(
                "A step on several processes requires all of them. Received: a collective that "
                "another process has left. See what that one printed last."
            ) from error
        losses, hits = sums.tolist()
        return losses, hits

    def _step(self, x: Any, y: Any, size: int) -> Any:
        self.model.zero_grad()
        probabilities = self._call(x, training=True)
        losses = keras.losses.sparse_categorical_crossentropy(y, probabilities)
        total = losses.sum()
        self._optimizer.scale_loss(total / size).backward()
        variables = self.model.trainable_variables
        with torch.no_grad():
            self._optimizer.apply([variable.value.grad for variable in variables], variables)
            hits = (probabilities.argmax(dim=-1) == y).sum()
            sums = torch.stack([total, hits.to(total.dtype)])
            if self._group is not None:
                distributed.all_reduce(sums, group=self._group)
        return sums

    def infer(self, x: Any) -> Any:
        """Probabilities in inference, in this process."""
        with torch.no_grad():
            return ops.convert_to_numpy(self.model(ops.convert_to_tensor(x), training=False))


def _summed(group: Any, bucket: Any) -> Any:
    """The sum of the gradients over the processes; by default torch averages them.

    Each process's gradients are then a part of what one device has. Multiplied by the number of
    processes beforehand, in float16 they would overflow where those of one device do not.
    """
    work = distributed.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])
