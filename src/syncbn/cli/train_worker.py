"""`python -m syncbn.cli.train_worker JOB_FOLDER`: one worker of `syncbn train`, which starts it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from syncbn.cli import EXIT_BAD_INPUT
from syncbn.errors import InputError, WorkerError

__all__ = ["main"]

EXIT_FAILED = 1


class _Unwatched:
    """The observer of a worker that shows nothing: its steps are the chief's."""

    def start(self, run: str, steps: int) -> None:
        """Nothing."""

    def advance(self, loss: float) -> None:
        """Nothing."""

    def stop_requested(self) -> bool:
        """Never: to stop, the parent ends all workers."""
        return False


def main(folder: Path) -> NoReturn:
    """Train, and end the process."""
    # At once and without words: what is finished is written, and the parent says the rest.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        _train(folder)
        sys.exit()  # the chief last, as enable_multi_worker() has it
    except InputError as error:
        print(f"syncbn: error: {error}", file=sys.stderr)
        code = EXIT_BAD_INPUT
    except WorkerError as error:
        print(f"syncbn: error: {error}", file=sys.stderr)
        code = EXIT_FAILED
    except Exception:  # noqa: BLE001 - whatever it is, it is shown and is the end
        traceback.print_exc()
        code = EXIT_FAILED
    sys.stdout.flush()
    sys.stderr.flush()
    # The frameworks' own way out of a cluster waits for workers that may never come.
    os._exit(code)


def _train(folder: Path) -> None:
    index = int(os.environ["RANK"])
    backend = os.environ["KERAS_BACKEND"]
    # Only now: a Ctrl-C while they are imported has a handler already.
    from syncbn.cli.start import start_framework
    from syncbn.cli.train import EXTRAS

    start_framework("train", backend, EXTRAS)
    import syncbn

    if backend == "tensorflow":
        syncbn.enable_multi_worker()  # a worker that is missing, late or gone is named
    from syncbn.cli.train_view import ProgressView
    from syncbn.training import workers

    with contextlib.ExitStack() as stack:
        chief = index == 0
        view = stack.enter_context(ProgressView(lambda: False)) if chief else _Unwatched()
        workers.train_as_worker(folder, index, view)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
