"""The process above the workers: `python -m syncbn.launch`, started by `launch()`.

It is a process of its own because entering a network needs one with a single thread, and because
each of the two outlives the other's being killed: the workers are its children and die with it, and
it ends them when the standard input that `launch()` holds open is closed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from syncbn.errors import InputError
from syncbn.launch import clusters, isolation, resources
from syncbn.launch.group import Control, Group, Outcome
from syncbn.launch.output import TENSORFLOW_NOTICES, Log, Screen
from syncbn.launch.reaping import Family, adopt_orphans, end_marked, with_mark
from syncbn.launch.settings import LaunchSettings
from syncbn.launch.spec import ClusterSpec, parse_hosts, split_address
from syncbn.launch.tasks import Task
from syncbn.launch.worker import Worker

__all__ = ["Order", "main", "receive"]

EXIT_BAD_INPUT = 2
LOG_LEVEL = "TF_CPP_MIN_LOG_LEVEL"
SIGNALS_OF_ONE = 1.0  # seconds between those of a process manager and of launch()
WARNING = (
    "warning: TensorFlow's worker servers listen on all interfaces without authentication: "
    "whoever reaches their ports can run code here. Train on a trusted network, behind a firewall"
)


class Order(NamedTuple):
    """What `launch()` hands over, as JSON."""

    command: Sequence[str]
    settings: LaunchSettings
    mark: str

    def to_json(self) -> str:
        """One line."""
        return json.dumps([list(self.command), self.settings.__dict__, self.mark])


def receive(descriptor: int) -> Order:
    """Read the order; the descriptor stays open after it."""
    text = b""
    while not text.endswith(b"\n"):
        data = os.read(descriptor, 1 << 16)
        if not data:
            raise SystemExit(EXIT_BAD_INPUT)  # who called is no more
        text += data
    command, settings, mark = json.loads(text)
    return Order(command, LaunchSettings(**settings), mark)


def main() -> int:
    """Run what `launch()` ordered; the exit code is the launcher's."""
    _open_what_is_closed()
    control = Control(0)
    adopt_orphans()
    order = receive(0)
    # Whoever asks for all that TensorFlow logs gets it.
    hidden = () if os.environ.get(LOG_LEVEL) == "0" else TENSORFLOW_NOTICES
    screen = Screen(("",) if order.settings.quiet else hidden, control.look)
    try:
        task = clusters.find_task(
            os.environ,
            order.settings,
            resources.available_cores(),
            os.cpu_count() or 1,
            socket.gethostname(),
        )
        control.together = 0.0 if task is None else SIGNALS_OF_ONE
        reason = _isolate(order.settings)
        return _Supervisor(order, control, screen, reason, task).run()
    except InputError as error:
        print(f"syncbn: error: {error}", file=sys.stderr)  # noqa: T201 - this is a command
        return EXIT_BAD_INPUT


def _open_what_is_closed() -> None:
    """Where the launcher was started without an output, a worker's pipe must not become it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _isolate(settings: LaunchSettings) -> str | None:
    """Enter a network of our own, if that is wanted and possible; None, or why it was not done.

    Raises:
        InputError: it was asked for and cannot be done.
    """
    if settings.cluster != "none":
        return "the other tasks' workers must reach them"
    if settings.hosts is not None:
        return "--hosts names other machines"
    if settings.isolate is False:
        return "--no-isolate"
    reason = isolation.why_not()
    if reason is None:
        isolation.enter()
    elif settings.isolate:
        raise InputError(
            "--isolate requires network namespaces for this user. "
            f"Received: {reason}. Allow user namespaces, or leave --isolate out on a trusted "
            "network."
        )
    return reason


class _Supervisor:
    """Starts one group after another until one ends well, or no restart is left."""

    def __init__(
        self,
        order: Order,
        control: Control,
        screen: Screen,
        not_isolated: str | None,
        task: Task | None,
    ) -> None:
        self._order = order
        self._task = task
        self._settings = order.settings
        self._control = control
        self._screen = screen
        self._not_isolated = not_isolated
        self._framework = self._settings.backend or resources.backend(os.environ)
        self._cores = resources.available_cores() if task is None else task.cores
        workers = self._settings.workers
        first = (self._settings.index or 0 if task is None else task.rank) * workers
        self._own = range(first, first + workers)  # the workers that this launcher starts

    def run(self) -> int:
        """The exit code of the last group."""
        with contextlib.ExitStack() as files:
            logs = self._open_logs(files)
            for restarts in range(self._settings.max_restarts + 1):
                outcome = self._run_group(restarts, logs)
                self._report(outcome)
                left = self._settings.max_restarts - restarts
                if not outcome.may_restart or self._control.asked or not left:
                    break
                self._screen.note(
                    f"restarting all workers ({restarts + 1} of {self._settings.max_restarts})"
                )
                if self._settings.hosts or self._task:
                    time.sleep(1)  # the ports are the same, and the other machines' workers end too
                    if self._control.look():
                        break
        return outcome.code

    def _run_group(self, restarts: int, logs: Mapping[int, Log]) -> Outcome:
        spec = self._spec()
        if restarts == 0:
            self._announce(spec)
            if self._task is not None:
                _check_ports(spec, self._own)
        settings = self._settings
        workers: list[Worker] = []
        try:
            for index in self._own:
                logs[index].begin(f"{spec.name(index)}, start {restarts + 1}")
                workers.append(
                    Worker(
                        index,
                        spec.name(index),
                        self._order.command,
                        self._environment(spec, index, restarts),
                        logs[index],
                        # A bar moves on a terminal alone, and there is one terminal.
                        frozenset(c for c in (1, 2) if index == 0 and os.isatty(c)),
                    )
                )
        except OSError as error:
            end_marked(self._order.mark, 0, Family(worker.process.pid for worker in workers))
            for worker in workers:
                worker.reap()
            raise InputError(
                f"Starting {settings.workers} worker(s) requires a program, processes and open "
                f"files. Received: {shlex.join(self._order.command)}: {error.strerror or error}. "
                "Check the program, and the limits: ulimit -u, ulimit -n."
            ) from error
        group = Group(
            spec,
            workers,
            self._screen,
            self._control,
            self._order.mark,
            settings.timeout,
            settings.grace,
        )
        return group.run()

    def _spec(self) -> ClusterSpec:
        """The cluster; on one machine alone at new ports for every group."""
        settings = self._settings
        if self._task is not None:
            return clusters.spec_of(self._task, settings)
        if settings.hosts is not None:
            hosts = parse_hosts(settings.hosts, settings.workers)
            return ClusterSpec.on_hosts(hosts, settings.workers)
        try:
            return ClusterSpec.on_this_machine(free_ports(settings.workers + 1))
        except OSError as error:
            raise InputError(
                f"{settings.workers} worker(s) require a free port each. Received: "
                f"{error.strerror or error}. Start fewer workers, or raise the limit of open "
                "files: ulimit -n."
            ) from error

    def _environment(self, spec: ClusterSpec, index: int, restarts: int) -> dict[str, str]:
        """What a worker gets; what is the user's to choose gives way to what the user has set."""
        settings = self._settings
        defaults = {
            "PYTHONUNBUFFERED": "1",  # lines must come as they are written, and before a SIGKILL
            LOG_LEVEL: "1",  # TensorFlow's notices, once for every worker
            **resources.thread_environment(settings.workers, self._cores),
        }
        on_loopback = all(split_address(one)[0] == "127.0.0.1" for one in spec.addresses)
        if self._not_isolated is None or (self._task and on_loopback and sys.platform == "linux"):
            # Both look for an interface by the machine's name, which need not be resolved.
            defaults |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        given = {
            **spec.environment(index),
            **self._devices(spec, index),
            "SYNCBN_TIMEOUT": str(settings.timeout),
            "SYNCBN_RESTARTS": str(restarts),
        }
        if settings.backend is not None:
            given["KERAS_BACKEND"] = settings.backend
        return with_mark({**defaults, **os.environ, **given}, self._order.mark)

    def _devices(self, spec: ClusterSpec, index: int) -> Mapping[str, str]:
        """Its GPUs: of the machine's, or of its task's where the process manager shared them."""
        sharing: Sequence[int] = spec.local_workers(spec.machines[index])
        chosen = {}
        if self._task is not None and self._task.has_own_gpus:
            sharing = self._own
            # By these torch's programs choose one of those that they see.
            chosen = {
                "LOCAL_RANK": str(sharing.index(index)),
                "LOCAL_WORLD_SIZE": str(len(sharing)),
                "GROUP_RANK": str(self._task.rank),
            }
        return chosen | {
            **resources.device_environment(
                sharing.index(index),
                len(sharing),
                self._settings.devices_per_worker,
                resources.visible_gpus(os.environ),
                self._framework,
            )
        }

    def _announce(self, spec: ClusterSpec) -> None:
        threads = max(1, self._cores // self._settings.workers)
        if self._task is not None:
            if self._task.rank == 0:
                self._screen.note(_in_words(self._task, spec, threads))
                self._screen.note(WARNING)
            return
        local = ", ".join(spec.addresses[index] for index in self._own)
        where = "in a network of their own (--no-isolate for downloads and the like)"
        self._screen.note(
            f"{len(self._own)} of {len(spec)} workers here, {threads} "
            f"thread(s) each, at {local}{'' if self._not_isolated else f', {where}'}"
        )
        if self._not_isolated:
            self._screen.note(f"{WARNING}. Not isolated: {self._not_isolated}")

    def _open_logs(self, files: contextlib.ExitStack) -> Mapping[int, Log]:
        """A log for each worker of this machine, in files if they are wanted.

        Raises:
            InputError: the folder cannot be written to.
        """
        if self._settings.log_dir is None:
            return {index: Log(None) for index in self._own}
        folder = Path(self._settings.log_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return {
                index: Log(
                    files.enter_context((folder / f"worker-{index}.log").open("ab", buffering=0)),
                    self._screen.note,
                )
                for index in self._own
            }
        except OSError as error:
            raise InputError(
                "--log-dir requires a folder that can be written to. Received: "
                f"{str(folder)!r} ({error.strerror or error}). Give another folder."
            ) from error

    def _report(self, outcome: Outcome) -> None:
        for line in outcome.report:
            self._screen.note(line)
        if outcome.last_lines:
            self._screen.note("its last lines:")
            for line in outcome.last_lines:
                self._screen.plain(f"    {line}")
        if self._not_isolated is None and any(map(_speaks_of_network, outcome.last_lines)):
            self._screen.note("the workers had a network of their own alone: see --no-isolate")
        if outcome.report and self._settings.log_dir:
            self._screen.note(f"the whole output of each worker is in {self._settings.log_dir}")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at on any interface, all different."""
    with contextlib.ExitStack() as sockets:
        taken = [sockets.enter_context(socket.socket()) for _ in range(count)]
        for one in taken:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in taken]


def _check_ports(spec: ClusterSpec, own: Sequence[int]) -> None:
    """The ports follow from a number: another cluster's on this machine may be the same.

    Raises:
        InputError: somebody listens at one of this launcher's.
    """
    addresses = [spec.addresses[index] for index in own]
    for address in [*addresses, *([spec.rendezvous] if own[0] == 0 else [])]:
        port = split_address(address)[1]
        with socket.socket() as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                one.bind(("", port))
            except OSError as error:
                raise InputError(
                    f"The workers of tasks require ports that all tasks know, here {port}. "
                    f"Received: {error.strerror or error}: somebody on this machine listens there. "
                    "Give all tasks the first of some free ports: --port."
                ) from error


def _in_words(task: Task, spec: ClusterSpec, threads: int) -> str:
    """What the process manager's environment was taken for."""
    places = [*spec.addresses[:4], *(["…"] if len(spec) > 4 else [])]
    return (
        f"{task.manager}: {len(spec)} workers in {len(task)} tasks on {len({*spec.machines})} "
        f"node(s), {threads} thread(s) each here, at {', '.join(places)}; JAX and torch meet at "
        f"{spec.rendezvous}"
    )


def _speaks_of_network(line: str) -> bool:
    words = (
        "name resolution",
        "Name or service not known",
        "unreachable",
        "getaddrinfo",
    )
    return any(word in line for word in words)
