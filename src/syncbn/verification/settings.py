"""What a verification is asked to do, and whether it can be done."""

from __future__ import annotations

import dataclasses

from syncbn.errors import InputError

__all__ = ["VerifySettings"]

_MOST_REPLICAS = 256


@dataclasses.dataclass(frozen=True)
class VerifySettings:
    """One verification; see `syncbn.verify`.

    Attributes:
        replicas: of one process, where there are no workers.
        steps: at most so many.
        batch_size: examples of a global batch; None for the default.
        workers: processes with a replica each; None for replicas of one process.
        repair: whether the runs have `enable_multi_worker()`.
        hold_random: whether layers that draw random numbers are in inference.
    """

    replicas: int = 2
    steps: int = 5
    batch_size: int | None = None
    workers: int | None = None
    repair: bool = False
    hold_random: bool = False

    @property
    def replicas_in_sync(self) -> int:
        """In all processes."""
        return self.workers or self.replicas

    def check(self) -> None:
        """Raise an InputError for the first value that cannot be meant."""
        for name, value, least in (
            ("replicas", self.replicas, 2),
            ("steps", self.steps, 1),
            ("batch_size", self.batch_size, 1),
            ("workers", self.workers, 2),
        ):
            if value is None:
                continue
            most = _MOST_REPLICAS if name in {"replicas", "workers"} else None
            number = isinstance(value, int) and not isinstance(value, bool)
            if not number or value < least or (most is not None and value > most):
                limits = f"from {least} to {most}" if most else f"of at least {least}"
                raise InputError(
                    f"A verification requires {name} as a number {limits}. Received: {value!r}. "
                    "Give another number."
                )
