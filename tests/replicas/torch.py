"""The layer on the processes of a gloo group, each with a part of its own; one part in this one.

Processes are started when a test first needs so many, and stay for the rest of the run. They come
from a server that has imported torch and Keras once, and is forked before it has any thread.
"""

from __future__ import annotations

import atexit
import datetime
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import ml_dtypes
import numpy as np
import torch
import torch.distributed as dist

import syncbn
from tests.harness import Case, Observed

# Seconds a process of the pool waits for the others in a collective, and this one for an answer.
COLLECTIVE_TIMEOUT = 20
ANSWER_TIMEOUT = 90


def start() -> None:
    """Prepare the process, once."""
    torch.set_num_threads(1)


class Pool:
    """Processes that run functions together, as the ranks of one gloo group."""

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Any]] = []  # process, connection
        self._folder = tempfile.TemporaryDirectory(prefix="syncbn")
        self._groups = 0
        self._size = 0  # of the group that there is now

    def run(
        self,
        function: Callable[..., Any],
        arguments: Sequence[tuple[Any, ...]],
        timeout: float = ANSWER_TIMEOUT,
    ) -> list[Any]:
        """The results of `function(*arguments[rank])` of each rank, within so many seconds.

        Raises:
            Exception: the first that a rank has raised, with the traceback there as a note.
        """
        results = self.outcomes(function, arguments, timeout)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    def outcomes(
        self,
        function: Callable[..., Any],
        arguments: Sequence[tuple[Any, ...]],
        timeout: float = ANSWER_TIMEOUT,
    ) -> list[Any]:
        """As `run`, but with what a rank has raised in the place of its result."""
        size = len(arguments)
        self._start(size)
        renewed = size != self._size
        self._groups += renewed
        store = str(Path(self._folder.name) / str(self._groups)) if renewed else None
        for rank, own in enumerate(arguments):
            self._workers[rank][1].send((store, size, function, own))
        results = self._answers(size, timeout)
        # After an error the ranks may be at different collectives: they get a new group.
        failed = any(isinstance(result, BaseException) for result in results)
        self._size = 0 if failed else size
        return results

    def _answers(self, size: int, timeout: float) -> list[Any]:
        deadline = time.monotonic() + timeout
        results, missing = [], []
        for rank, (process, connection) in enumerate(self._workers[:size]):
            try:
                answered = connection.poll(max(deadline - time.monotonic(), 0))
                results.append(connection.recv() if answered else None)
            except (EOFError, ConnectionResetError):
                answered = False
            if not answered:
                missing.append(f"rank {rank} (alive: {process.is_alive()})")
        if missing:
            self.stop()
            raise TimeoutError(f"No answer within {timeout} s from {', '.join(missing)}")
        return results

    def _start(self, size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed", "keras", "syncbn.layer"])
        for rank in range(len(self._workers), size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def stop(self) -> None:
        """End the processes, these and no others."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
        for process, _ in self._workers:
            process.join(10)
        self._workers, self._size = [], 0


POOL = Pool()
atexit.register(POOL.stop)


def _serve(connection: Any, rank: int) -> None:
    """What a process of the pool does."""
    from tests import mutants

    start()
    mutants.apply(os.environ.get("SYNCBN_MUTANT", ""))
    while True:
        try:
            store, size, function, arguments = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            if store is not None:
                if dist.is_initialized():
                    dist.destroy_process_group()
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{store}",
                    rank=rank,
                    world_size=size,
                    timeout=datetime.timedelta(seconds=COLLECTIVE_TIMEOUT),
                )
            keras.backend.clear_session(free_memory=False)
            keras.utils.set_random_seed(0)
            result = function(*arguments)
        except Exception as error:  # noqa: BLE001 - it is raised where the test is
            error.add_note(f"rank {rank}: {traceback.format_exc()}")
            result = error
        connection.send(result)


def tensor(array: Any) -> torch.Tensor:
    """A tensor of a NumPy array, bfloat16 too, which torch does not take."""
    array = np.ascontiguousarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def array(tensor: torch.Tensor) -> np.ndarray:
    """A NumPy array of a tensor, bfloat16 too."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy().copy()


def make_layer(case: Case, dtype: str = "float32", **arguments: Any) -> Any:
    """A layer built for any size, holding the case's weights, or those of `state` by name."""
    layer_class = arguments.pop("layer_class", syncbn.SyncBatchNormalization)
    state = arguments.pop("state", None) or {}
    layer = layer_class(
        axis=case.axis,
        epsilon=case.epsilon,
        momentum=case.momentum,
        dtype=dtype,
        **(dict(case.options) | arguments),
    )
    shape: list[int | None] = [None] * case.parts[0].ndim
    shape[case.axis] = len(case.gamma)
    layer.build(tuple(shape))
    if layer.scale:
        layer.gamma.assign(case.gamma)
    if layer.center:
        layer.beta.assign(case.beta)
    for weight in layer.weights:
        if weight.name in state:
            weight.assign(state[weight.name])
    return layer


def observe(
    case: Case,
    *,
    mode: str = "graph",
    dtype: str | None = None,
    training: bool = True,
    **arguments: Any,
) -> Observed:
    """What the replicas see in one training step, each in a process of its own.

    Args:
        case: data and weights.
        mode: "graph" or "eager", the same here: torch runs eagerly unless it is told otherwise, and
            `torch.compile` has tests of its own.
        dtype: the layer's policy; the data's own by default.
        training: what the layer is called with.
        **arguments: of the layer; `state`, of `make_layer`.
    """
    assert mode in ("graph", "eager")
    dtype = dtype or case.parts[0].dtype.name
    parts = [replica_case(case, replica) for replica in range(len(case.parts))]
    calls = [(part, dtype, training, arguments) for part in parts]
    results = [step(*calls[0])] if len(parts) == 1 else POOL.run(step, calls)
    *observed, weights = map(list, zip(*results, strict=True))
    return Observed(*observed, {name: [own[name] for own in weights] for name in weights[0]})


def replica_case(case: Case, replica: int) -> Case:
    """What one process gets of a case."""
    own = slice(replica, replica + 1)
    return case._replace(
        parts=case.parts[own],
        cotangents=case.cotangents[own],
        masks=case.masks and case.masks[own],
        weights=case.weights and case.weights[own],
        options=dict(case.options),  # its own type cannot be sent
    )


def call_arguments(case: Case) -> dict[str, torch.Tensor]:
    """The mask and weights of a replica, by name."""
    given = {"mask": case.masks, "weights": case.weights}
    return {name: tensor(values[0]) for name, values in given.items() if values is not None}


def step(case: Case, dtype: str, training: bool, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """One step on this replica: outputs, gradients, moving statistics, all weights by name."""
    layer = make_layer(case, dtype, **arguments)
    x = tensor(case.parts[0]).requires_grad_()
    y = layer(x, training=training, **call_arguments(case))
    y.backward(tensor(case.cotangents[0]).to(y.dtype))

    def gradient(weight: Any) -> np.ndarray:
        # That of a frozen layer has none.
        own = None if weight is None else weight.value.grad
        return np.zeros(len(case.gamma)) if own is None else array(own)

    return (
        array(y),
        array(x.grad),
        gradient(layer.gamma if layer.scale else None),
        gradient(layer.beta if layer.center else None),
        array(layer.moving_mean.value),
        array(layer.moving_variance.value),
        {weight.name: array(weight.value) for weight in layer.weights},
    )
