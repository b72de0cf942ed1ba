"""What processes tell each other beside the collectives: JAX's coordination service.

It has timeouts, and knows which process is missing; a collective has and knows neither.
"""

from __future__ import annotations

import time

import jax

from syncbn.errors import NotSynchronizableError, WorkerError

__all__ = ["Coordination", "process_count"]

_ROOT = "syncbn/data"


def process_count() -> int:
    """How many processes JAX runs on."""
    return int(jax.process_count())


class Coordination:
    """Texts of all processes, by key."""

    def __init__(self) -> None:
        # JAX has no public name for its client; libraries of checkpoints use the same one.
        from jax._src import distributed

        self._client = distributed.global_state.client
        self.process = int(jax.process_index())
        self.processes = process_count()
        if self._client is None:
            raise NotSynchronizableError(
                "Several processes require JAX's coordination service. Received: "
                f"{self.processes} processes without one. Call keras.distribution.initialize() "
                "or jax.distributed.initialize() first."
            )

    def tell(self, key: str, text: str) -> None:
        """Leaves this process's text; it waits for nobody."""
        try:
            self._client.key_value_set(f"{_ROOT}/{key}/{self.process}", text)
        except jax.errors.JaxRuntimeError as error:
            raise WorkerError(_gone(error)) from error

    def hear(self, key: str, topic: str, seconds: float) -> list[str]:
        """The texts of all processes, in their order; the topic is for the error.

        Raises:
            WorkerError: not all came in time, or the service is gone; the former names them.
        """
        deadline = time.monotonic() + seconds
        while True:
            found = self._found(key)
            missing = [rank for rank in range(self.processes) if rank not in found]
            if not missing:
                return [found[rank] for rank in range(self.processes)]
            left = deadline - time.monotonic()
            if left <= 0:
                raise WorkerError(
                    f"Every process must bring its part of {topic} within {seconds:g} s. Nothing "
                    f"came from process {', '.join(map(str, missing))} of {self.processes}: look "
                    "at its output for an error, or for a slow input (then raise `timeout`)."
                )
            self._wait(f"{_ROOT}/{key}/{missing[0]}", left)

    def forget(self, key: str) -> None:
        """Removes all texts of a key; only when everybody has heard them."""
        self._client.key_value_delete(f"{_ROOT}/{key}")

    def _found(self, key: str) -> dict[int, str]:
        try:
            pairs = self._client.key_value_dir_get(f"{_ROOT}/{key}")
        except jax.errors.JaxRuntimeError as error:
            raise WorkerError(_gone(error)) from error
        return {int(name.rsplit("/", 1)[1]): text for name, text in pairs}

    def _wait(self, name: str, seconds: float) -> None:
        try:
            self._client.blocking_key_value_get(name, max(1, int(1000 * seconds)))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise WorkerError(_gone(error)) from error


def _gone(error: Exception) -> str:
    return (
        "Processes must reach JAX's coordination service, which process 0 runs. It gave: "
        f"{str(error).splitlines()[0]}. Look at the output of process 0."
    )
