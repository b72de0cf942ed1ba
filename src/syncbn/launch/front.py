"""`launch()`: starts the supervisor, hands signals on to it, and outlives it."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from syncbn.errors import InputError
from syncbn.launch.reaping import end_marked, new_mark
from syncbn.launch.settings import LaunchSettings
from syncbn.launch.supervisor import Order
from syncbn.launch.worker import exit_code, in_words

__all__ = ["launch"]

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def launch(command: Sequence[str], settings: LaunchSettings) -> int:
    """Run a command as each worker of a cluster on this machine, and see them to their end.

    Every worker's environment tells it about the cluster: `TF_CONFIG` for TensorFlow,
    `KERAS_DISTRIBUTION_*` for JAX, `RANK`, `WORLD_SIZE`, `MASTER_ADDR`, … for torch. It limits the
    threads by the cores. `SYNCBN_TIMEOUT` is what `syncbn.enable_multi_worker()` takes as its
    timeout, `SYNCBN_RESTARTS` how often the group was started again. The workers' output comes on
    standard output and standard error with the worker's number before each line.

    The first worker that fails ends the others: SIGTERM, `grace` seconds, SIGKILL. SIGINT, SIGTERM
    and SIGHUP of this process are handed on. No process that a worker started is left, even when
    this process is killed with SIGKILL.

    Args:
        command: the program and its arguments, as `[sys.executable, "train.py"]`.
        settings: how many workers, where, and the rest.

    Returns:
        0, or the exit code of the first worker that failed, 128 + N for signal N; 124 if a worker
        never came up; 130 after Ctrl-C; 2 for settings that this machine cannot serve.

    Raises:
        InputError: settings that cannot be meant, or no process to be had.
    """
    settings.check()
    order = Order(list(command), settings, new_mark())
    with _children_are_waited_for(), _signals_held() as let_go:
        supervisor = _start_supervisor()
        assert supervisor.stdin is not None
        with _handing_on(supervisor):
            let_go()
            # Held open as long as this process lives.
            with contextlib.suppress(BrokenPipeError):
                supervisor.stdin.write(f"{order.to_json()}\n".encode())
                supervisor.stdin.flush()
            status = supervisor.wait()
    with contextlib.suppress(BrokenPipeError):
        supervisor.stdin.close()
    if status:
        end_marked(order.mark, 0)
    if status < 0:
        print(  # noqa: T201 - the place of the supervisor, which would have said it
            f"syncbn launch: the process that watches the workers {in_words(status)}; "
            "all workers were ended",
            file=sys.stderr,
        )
    return exit_code(status)


def _start_supervisor() -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            # By its file, as this process may have found the package in its own way. -P: a
            # random.py or queue.py in the user's folder is not the supervisor's.
            [sys.executable, "-P", str(Path(__file__).with_name("__main__.py"))],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise InputError(
            "syncbn launch requires a process that watches the workers. Received: "
            f"{error.strerror or error}. Check the limits of processes and of memory."
        ) from error


@contextlib.contextmanager
def _children_are_waited_for() -> Iterator[None]:
    """Where SIGCHLD is ignored, a child's exit code is lost and every failure looks like success.

    Raises:
        InputError: it is ignored, and this thread cannot change that.
    """
    if signal.getsignal(signal.SIGCHLD) is not signal.SIG_IGN:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        raise InputError(
            "syncbn launch requires the exit codes of its processes. Received: a process that "
            "ignores SIGCHLD. Call signal.signal(signal.SIGCHLD, signal.SIG_DFL) before."
        )
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)


@contextlib.contextmanager
def _signals_held() -> Iterator[Callable[[], object]]:
    """Signals to hand on wait until they can be; gives what ends that.

    The supervisor starts with them held too, until it knows what to do with them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    try:
        yield lambda: signal.pthread_sigmask(signal.SIG_SETMASK, before)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _handing_on(supervisor: subprocess.Popen[bytes]) -> Iterator[None]:
    """Meanwhile the signals that ask this process to end are the supervisor's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _FORWARDED}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:  # as nohup leaves SIGHUP
                signal.signal(number, lambda received, _: supervisor.send_signal(received))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
