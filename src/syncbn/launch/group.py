"""One group of workers, from its start to its end: the first that fails ends the others."""

from __future__ import annotations

import os
import select
import selectors
import signal
import time
from types import FrameType
from typing import NamedTuple

from syncbn.launch.arrival import Arrival
from syncbn.launch.output import Screen
from syncbn.launch.reaping import Family, end_marked
from syncbn.launch.spec import ClusterSpec
from syncbn.launch.worker import Worker, exit_code, in_words

__all__ = ["EXIT_TIMEOUT", "Control", "Group", "Outcome"]

EXIT_TIMEOUT = 124  # as `timeout` of the coreutils
SHOWN_LINES = 10
TICK = 0.1  # seconds between two looks at the processes
LEFTOVERS = 1.0  # seconds that what the workers left behind has to end


class Control:
    """What the process that called wants: signals, and whether it is still there.

    `asked`: the signals that have come, in their order. `together`: within so many seconds the same
    signal is one. Slurm sends it to all processes of a task at a time, and each launcher hands on
    its own; the second must not be taken for a user's who will not wait.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.asked: list[int] = []
        self.is_alone = False
        self.together = 0.0
        self._last = 0.0
        self._parent = os.getppid()
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        for number in numbers:
            signal.signal(number, self._ask)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)  # launch() held them until now

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not (self.asked[-1:] == [number] and now - self._last < self.together):
            self.asked.append(number)
        self._last = now

    def listen(self) -> None:
        """Read what it writes, which is nothing, until it is gone."""
        self.is_alone = self.is_alone or not os.read(self.descriptor, 1)

    def look(self) -> bool:
        """Whether there is a reason to end all, found without waiting for one."""
        while not self.is_alone and select.select([self.descriptor], [], [], 0)[0]:
            self.listen()
        # Another child of that process may have inherited, and keep, what is to be closed.
        self.is_alone = self.is_alone or os.getppid() != self._parent
        return self.is_alone or bool(self.asked)


class Outcome(NamedTuple):
    """How a group ended."""

    code: int  # the launcher's exit code: that of the worker that failed first
    report: list[str]  # what to say of it; empty if all ended well
    last_lines: list[str]  # of the worker that failed
    may_restart: bool


class Group:
    """The workers of this machine.

    Args:
        spec: the cluster.
        workers: those of it on this machine, running.
        screen: where their output goes.
        control: what the user wants.
        mark: in the environment of the workers and of all that they start.
        timeout: seconds that one may be missing.
        grace: seconds between SIGTERM and SIGKILL.
    """

    def __init__(
        self,
        spec: ClusterSpec,
        workers: list[Worker],
        screen: Screen,
        control: Control,
        mark: str,
        timeout: float,
        grace: float,
    ) -> None:
        self._spec = spec
        self._workers = workers
        self._screen = screen
        self._control = control
        self._mark = mark
        self._timeout = timeout
        self._grace = grace
        self._family = Family(worker.process.pid for worker in workers)
        self._arrival = Arrival(spec, timeout)
        self._selector = selectors.DefaultSelector()
        self._some_ended: float | None = None
        self._noted = False

    def run(self) -> Outcome:
        """Until all have ended by themselves, or one has failed and all others were ended."""
        self._selector.register(self._control.descriptor, selectors.EVENT_READ, None)
        for worker in self._workers:
            for stream in worker.streams:
                self._selector.register(stream.descriptor, selectors.EVENT_READ, (worker, stream))
        try:
            outcome = self._watch()
        finally:
            self._finish()
        return outcome

    def _watch(self) -> Outcome:
        while True:
            self._pump()
            self._control.look()
            if self._control.is_alone:
                return self._abandoned()
            if self._control.asked:
                return self._interrupted(self._control.asked[0])
            failed = self._first_failure()
            if failed is not None:
                return self._failed(failed)
            if all(worker.status() == 0 for worker in self._workers):
                return Outcome(0, [], [], may_restart=False)
            self._arrival.look()
            overdue = self._arrival.overdue()
            if overdue:
                return self._incomplete(list(overdue))
            self._note_the_last_ones()
            self._family.reap()

    def _pump(self) -> None:
        """Pass output on for a moment."""
        for key, _ in self._selector.select(TICK):
            if key.data is None:
                self._control.listen()
                if self._control.is_alone:
                    self._selector.unregister(key.fd)
                continue
            worker, stream = key.data
            if not worker.read(stream, self._screen):
                self._selector.unregister(stream.descriptor)

    def _first_failure(self) -> Worker | None:
        """Of those that failed since the last look one that was killed is the likelier cause."""
        failed = [worker for worker in self._workers if worker.status()]
        killed = [worker for worker in failed if (worker.status() or 0) < 0]
        return next(iter(killed or failed), None)

    def _failed(self, worker: Worker) -> Outcome:
        status = worker.status() or 0
        self._end_all(signal.SIGTERM)
        worker.drain(self._screen)
        return Outcome(
            exit_code(status),
            [f"{worker.name} {in_words(status)}"],
            self._last_lines(worker),
            may_restart=True,
        )

    def _incomplete(self, overdue: list[int]) -> Outcome:
        """Some workers have come up and wait for others that have not."""
        local = {worker.index: worker for worker in self._workers}
        report = [
            f"{len(self._spec)} workers require each other; after {self._timeout:.0f} s "
            f"{len(self._spec) - len(overdue)} have come up. Missing:"
        ]
        for index in overdue:
            found = self._arrival.found(index)
            if index in local:
                status = local[index].status()
                state = "runs" if status is None else in_words(status)
                report.append(
                    f"{self._spec.name(index)}: its process {state}, and its address answers: "
                    f"{found}. Does every worker make the strategy?"
                )
            else:
                report.append(
                    f"{self._spec.name(index)}: {found}. Is the launcher running there, for the "
                    "same cluster, and does a firewall let the port through?"
                )
        report.append("Give --timeout more seconds where a worker only needs longer.")
        first = local.get(overdue[0])
        self._end_all(signal.SIGTERM)
        return Outcome(EXIT_TIMEOUT, report, self._last_lines(first), may_restart=True)

    def _interrupted(self, number: int) -> Outcome:
        # Tracebacks of all workers at a time would help nobody.
        self._screen.only_chief = True
        self._end_all(number)
        report = [f"interrupted by {signal.Signals(number).name}; all workers have ended"]
        return Outcome(128 + number, report, [], may_restart=False)

    def _abandoned(self) -> Outcome:
        """The process that called was killed: nobody is left to ask, and nobody to tell."""
        for worker in self._workers:
            worker.send(signal.SIGKILL, group=True)
        return Outcome(128 + signal.SIGKILL, [], [], may_restart=False)

    def _end_all(self, number: int) -> None:
        """The signal, some seconds, SIGKILL; the latter at once where the user asks again."""
        asked = len(self._control.asked)
        for worker in self._workers:
            worker.send(number)
        deadline = time.monotonic() + self._grace
        while any(worker.status() is None for worker in self._workers):
            self._control.look()
            again = len(self._control.asked) > asked or self._control.is_alone
            if again or time.monotonic() >= deadline:
                for worker in self._workers:
                    worker.send(signal.SIGKILL, group=True)
            self._pump()

    def _note_the_last_ones(self) -> None:
        """Say it once where some have ended well and the others go on: training has no such end."""
        running = [worker for worker in self._workers if worker.status() is None]
        if self._noted or len(running) == len(self._workers):
            return
        self._some_ended = self._some_ended or time.monotonic()
        if time.monotonic() - self._some_ended >= self._timeout:
            self._noted = True
            names = ", ".join(worker.name for worker in running)
            self._screen.note(
                f"still waiting for {names}; the others ended well {self._timeout:.0f} s ago"
            )

    def _last_lines(self, worker: Worker | None) -> list[str]:
        return [] if worker is None else list(worker.log.last)[-SHOWN_LINES:]

    def _finish(self) -> None:
        """No process, no descriptor and no half line is left."""
        grace = 0 if self._control.is_alone else LEFTOVERS
        end_marked(self._mark, grace, self._family)
        for worker in self._workers:
            worker.reap()
            worker.drain(self._screen)
        self._arrival.close()
        self._selector.close()
        self._screen.close()
