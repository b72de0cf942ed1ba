"""`enable_multi_worker`: puts the repairs in, once, and takes them out again."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from syncbn.errors import InputError, RepairError
from syncbn.multi_worker.catalogue import REPAIRS
from syncbn.multi_worker.repair import Applied

__all__ = ["MultiWorker", "default_timeout", "enable_multi_worker"]

DEFAULT_TIMEOUT = 120.0
TIMEOUT_VARIABLE = "SYNCBN_TIMEOUT"


class MultiWorker:
    """The repairs that are in effect.

    A context manager: leaving it undoes them, unless they were in effect before it was entered.
    `applied`: the names of the repairs that this Keras needed; `not_needed`: those it did not;
    `without`: those left out on request. `timeout`: seconds that one worker waits for another.
    """

    def __init__(self, without: frozenset[str], timeout: float) -> None:
        self.without = without
        self.timeout = timeout
        self.applied: tuple[str, ...] = ()
        self.not_needed: tuple[str, ...] = ()
        self._calls = 0
        self._patches: list[Applied] = []

    def _apply(self) -> None:
        """Ask every probe before the first patch, so that an error leaves Keras as it was."""
        # Here and not above: the catalogue can be read where Keras is broken or absent.
        import keras

        if keras.backend.backend() != "tensorflow":
            self.not_needed = tuple(repair.name for repair in REPAIRS)
            return
        wanted = [repair for repair in REPAIRS if repair.name not in self.without]
        needed = [repair for repair in wanted if repair.is_needed()]
        from syncbn.multi_worker import devices

        try:
            for patch in devices.patches():
                self._patches.append(patch.apply())
            for repair in needed:
                for patch in repair.patches():
                    self._patches.append(patch.apply())
        except BaseException:
            self.undo()
            raise
        self.applied = tuple(repair.name for repair in needed)
        self.not_needed = tuple(repair.name for repair in wanted if repair not in needed)

    def undo(self) -> None:
        """Give Keras its own code back. Doing it twice does nothing.

        Raises:
            RepairError: somebody else has patched Keras on top of it. What was taken out until
                then is put back: all repairs stay in effect.
        """
        global _active
        with _lock:
            undone: list[Applied] = []
            try:
                while self._patches:
                    self._patches[-1].undo()
                    undone.append(self._patches.pop())
            except RepairError:
                self._patches += [applied.patch.apply() for applied in reversed(undone)]
                raise
            self.applied = ()
            self._calls = 0
            if _active is self:
                _active = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._calls -= 1
        if self._calls <= 0:
            self.undo()


_active: MultiWorker | None = None
_lock = threading.RLock()


def active() -> MultiWorker | None:
    """What is in effect now."""
    return _active


def default_timeout() -> float:
    """Seconds that one worker waits for another where the program does not say.

    Raises:
        InputError: the environment variable is no positive number.
    """
    text = os.environ.get(TIMEOUT_VARIABLE)
    if text is None:
        return DEFAULT_TIMEOUT
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InputError(
            f"The environment variable {TIMEOUT_VARIABLE} requires seconds, more than 0. "
            f"Received: {text!r}. Set another number, or unset it for {DEFAULT_TIMEOUT:g}."
        )
    return seconds


def _names_of_repairs(names: Iterable[str]) -> frozenset[str]:
    given = frozenset(names)
    unknown = given - {repair.name for repair in REPAIRS}
    if unknown:
        raise InputError(
            "`without` requires names of repairs. "
            f"Received: {sorted(unknown)}. There are: {[repair.name for repair in REPAIRS]}."
        )
    return given


def enable_multi_worker(
    *, without: Iterable[str] = (), timeout: float | None = None
) -> MultiWorker:
    """Make Keras's training on several replicas and workers give what one device gives.

    Under `tf.distribute`, `fit`, `evaluate`, `predict` and their kin, of models with any layers,
    then have the loss, the metrics, the gradients and the weights of one device on the whole global
    batch; `syncbn.multi_worker.REPAIRS` and docs/how-to/multi-worker.md list what is repaired. On
    one replica, and where this Keras does not need a repair, nothing changes.

    Call it once, on every worker, before the strategy is made. Calling it again gives the same
    object. That is a context manager; leaving it gives Keras its own code back, unless it was in
    effect before. `undo()` does so in any case. What a model has traced meanwhile stays.

    Args:
        without: names of repairs to leave out, where Keras's own rule is wanted:
            `without=["seeds"]` draws the same dropout mask on every replica.
        timeout: seconds that one worker waits for another, in a step, a checkpoint or a new
            variable, and at the start, before it raises a WorkerError which names it. By default
            those of the environment variable SYNCBN_TIMEOUT, which `syncbn launch` sets, else 120.

    Returns:
        The repairs in effect: `applied`, `not_needed`, `undo()`.

    Raises:
        InputError: there is no repair of such a name; the timeout, or SYNCBN_TIMEOUT, is not
            positive; it is in effect already with other arguments.
        RepairError: a repair cannot tell whether this Keras needs it. Keras is left as it was.

    References:
        Keras issue 20585; of each repair its public issue, `syncbn.multi_worker.REPAIRS[…].issue`.

    Examples:
        >>> syncbn.enable_multi_worker().applied[:2]
        ('building', 'steps')
    """
    global _active
    left_out = _names_of_repairs(without)
    if timeout is not None and not 0 < timeout < math.inf:
        raise InputError(f"`timeout` requires seconds, more than 0. Received: {timeout}.")
    with _lock:
        if timeout is None:
            timeout = default_timeout() if _active is None else _active.timeout
        if _active is None:
            enabled = MultiWorker(left_out, timeout)
            enabled._apply()
            _active = enabled
        elif (_active.without, _active.timeout) != (left_out, timeout):
            raise InputError(
                "enable_multi_worker() requires the arguments with which it is in effect already, "
                f"without={sorted(_active.without)} and timeout={_active.timeout}. Received: "
                f"without={sorted(left_out)}, timeout={timeout}. Call undo() on what it returned."
            )
        _active._calls += 1
        return _active
