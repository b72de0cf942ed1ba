"""`python -m syncbn.cli.verify_worker FOLDER`: one worker of `verify`, which starts it."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from syncbn.cli import EXIT_BAD_INPUT
from syncbn.errors import InputError

__all__ = ["main"]

EXIT_FAILED = 1


def main(folder: Path) -> NoReturn:
    """Train, and end the process."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        _train(folder)
        sys.exit()
    except InputError as error:
        print(f"syncbn: error: {error}", file=sys.stderr)
        code = EXIT_BAD_INPUT
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent says so
        from syncbn.verification.workers import note_failure

        note_failure(folder, error)
        print(f"syncbn verify: {type(error).__name__}", file=sys.stderr)
        code = EXIT_FAILED
    sys.stdout.flush()
    sys.stderr.flush()
    # The frameworks' own way out of a cluster waits for workers that may never come.
    os._exit(code)


def _train(folder: Path) -> None:
    from syncbn.cli.start import start_framework

    start_framework("verify", os.environ["KERAS_BACKEND"])
    from syncbn.verification.workers import needs_repair, run_as_worker

    if needs_repair(folder):
        import syncbn

        syncbn.enable_multi_worker()
    run_as_worker(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
