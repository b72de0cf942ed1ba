"""The parts of the launcher that are pure: the cluster, shares of a machine, what is shown."""

import fcntl
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from syncbn.errors import InputError
from syncbn.launch import ClusterSpec, LaunchSettings, arrival
from syncbn.launch.group import Control
from syncbn.launch.output import LAST_LINES, Lines, Log, Screen, is_progress, settled
from syncbn.launch.reaping import MARK, with_mark
from syncbn.launch.resources import backend, device_environment, thread_environment, visible_gpus
from syncbn.launch.spec import parse_hosts, split_address
from syncbn.launch.worker import has_data


def test_workers_of_several_hosts_are_numbered_machine_by_machine():
    spec = ClusterSpec.on_hosts(("a:4000", "[fe80::1]:5000"), workers=2)
    assert spec.addresses == ("a:4000", "a:4001", "[fe80::1]:5000", "[fe80::1]:5001")
    assert spec.rendezvous == "a:4002"
    assert [list(spec.local_workers(machine)) for machine in (0, 1)] == [[0, 1], [2, 3]]
    environment = spec.environment(3)
    assert json.loads(environment["TF_CONFIG"])["task"] == {"type": "worker", "index": 3}
    assert [environment[key] for key in ("RANK", "LOCAL_RANK", "GROUP_RANK")] == ["3", "1", "1"]
    assert [environment[key] for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")] == ["4", "2"]
    assert environment["MASTER_ADDR"] == "a"
    assert environment["MASTER_PORT"] == "4002"


def test_an_ipv6_rendezvous_has_no_brackets_for_torch():
    assert ClusterSpec.on_hosts(("[::1]:4000",)).environment(0)["MASTER_ADDR"] == "::1"


@pytest.mark.parametrize("address", ["a", "a:", ":1", "a:b", "a:0", "a:65536", "::1:7", "[::1:7"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(InputError, match="Received"):
        split_address(address)


@pytest.mark.parametrize(
    ("hosts", "workers"),
    [
        ("a:4000,a:4000", 1),
        ("a:4000,a:4001", 1),  # the rendezvous is at 4001
        ("a:4000,a:4001", 2),
        ("a:65535", 1),  # no port left for the rendezvous
        ("a:4000,", 1),
    ],
)
def test_hosts_whose_ports_meet_are_refused(hosts, workers):
    with pytest.raises(InputError, match=r"Received: .*\. (Give|Add)"):
        parse_hosts(hosts, workers)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"workers": 0}, "--workers requires a number from 1"),
        ({"max_restarts": -1}, "--max-restarts requires a number from 0"),
        ({"devices_per_worker": 0}, "--devices-per-worker requires"),
        ({"timeout": 0.0}, "--timeout requires seconds"),
        ({"timeout": float("nan")}, "--timeout requires seconds"),
        ({"grace": float("inf")}, "--grace requires seconds"),
        ({"backend": "theano"}, "--backend requires one of"),
        ({"index": 0}, "--index requires --hosts"),
        ({"hosts": "a:1,b:1"}, "--index requires the number of this machine"),
        ({"hosts": "a:1,b:1", "index": 2}, "from 0 to 1. Received: 2"),
        ({"hosts": "a:1,b:1", "index": 0, "isolate": True}, "cuts the workers off"),
        ({"cluster": "slurm", "isolate": True}, "cuts the workers off"),
        ({"cluster": "pbs"}, "--cluster requires one of none, slurm, mpi"),
        ({"cluster": "mpi", "hosts": "a:1,b:1", "index": 0}, "which tells it"),
        ({"port": 4000}, "--port is for several tasks of srun or mpirun"),
        ({"cluster": "slurm", "port": 65536}, "--port requires a number from 1 to 65535"),
        ({"cluster": "mpi", "hosts": "a:1", "port": 4000}, "with --cluster mpi and --hosts"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        LaunchSettings(**settings).check()


def test_threads_are_shared_and_never_none():
    assert thread_environment(4, 10)["OMP_NUM_THREADS"] == "2"
    assert thread_environment(4, 2)["TF_NUM_INTRAOP_THREADS"] == "1"
    # One thread for all operations would let one that waits hold up the others.
    assert thread_environment(4, 2)["TF_NUM_INTEROP_THREADS"] == "2"


def test_gpus_are_shared_out_and_torch_chooses_by_itself():
    gpus = visible_gpus({"CUDA_VISIBLE_DEVICES": "2, 5,GPU-x,7,-1,9"})
    assert gpus == ["2", "5", "GPU-x", "7"]
    shares = [device_environment(rank, 2, None, gpus, "tensorflow") for rank in (0, 1)]
    assert shares == [{"CUDA_VISIBLE_DEVICES": "2,5"}, {"CUDA_VISIBLE_DEVICES": "GPU-x,7"}]
    # Of the visible ones, by their places: Slurm's JAX would take the one of the task's number.
    own = {"CUDA_VISIBLE_DEVICES": "GPU-x,7", "JAX_LOCAL_DEVICE_IDS": "0,1"}
    assert device_environment(1, 2, None, gpus, "jax") == own
    assert device_environment(1, 2, 1, gpus, "jax")["CUDA_VISIBLE_DEVICES"] == "5"
    assert device_environment(1, 2, None, gpus, "torch") == {}
    with pytest.raises(InputError, match="requires 1: a process of torch"):
        device_environment(0, 2, 2, gpus, "torch")
    with pytest.raises(InputError, match=r"3 workers on this machine require 2 GPU\(s\) each"):
        device_environment(0, 3, 2, gpus, "tensorflow")
    with pytest.raises(InputError, match="Start fewer workers"):
        device_environment(0, 5, None, gpus, "tensorflow")
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []


def test_virtual_devices_stand_in_for_gpus(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    assert device_environment(0, 2, 3, [], "tensorflow") == {"SYNCBN_DEVICES_PER_WORKER": "3"}
    flags = device_environment(0, 2, 3, [], "jax")["XLA_FLAGS"]
    assert flags == "--xla_dump_to=x --xla_force_host_platform_device_count=3"
    assert device_environment(0, 2, None, [], "jax") == {}


def test_the_backend_is_what_keras_would_take(tmp_path):
    assert backend({"KERAS_BACKEND": "jax", "KERAS_HOME": str(tmp_path)}) == "jax"
    assert backend({"KERAS_HOME": str(tmp_path)}) == "tensorflow"
    (tmp_path / "keras.json").write_text('{"backend": "torch"}')
    assert backend({"KERAS_HOME": str(tmp_path)}) == "torch"
    (tmp_path / "keras.json").write_text("broken")
    assert backend({"KERAS_HOME": str(tmp_path)}) == "tensorflow"


def test_a_bar_is_told_from_a_line_and_settles_to_its_last_state():
    keras_bar = "\r1/3 ━━" + "\b" * 6 + "\r3/3 ━━ loss: 0.1"
    assert is_progress(keras_bar)
    assert is_progress(" 10%|#\r 20%|##")
    assert is_progress("Epoch 3/10")
    assert not is_progress("Epoch 3/10 was good")
    assert not is_progress("from Windows\r")
    assert settled(keras_bar) == "3/3 ━━ loss: 0.1"
    assert settled("plain\r") == "plain"
    assert settled("\r  ") == ""


def test_lines_come_whole_whatever_the_pieces():
    lines = Lines()
    data = "ä\nzwei\n".encode()
    found = [line for byte in data for line in lines.feed(lines.decode(bytes([byte])))]
    assert found == ["ä", "zwei"]
    assert lines.feed("rest") == []
    assert lines.end() == ["rest"]
    assert lines.end() == []


def test_a_bar_without_end_does_not_grow_for_ever():
    lines = Lines()
    for step in range(10_000):
        assert lines.feed(f"\r{step}/10000 " + "━" * 20) == []
        assert len(lines.rest) < 100_000
    assert settled(lines.end()[0]).startswith("9999/10000")


def test_a_log_keeps_the_last_lines_of_a_worker():
    log = Log(None)
    log.add("I0000 of the build")
    for number in range(LAST_LINES + 5):
        log.add(f"line {number}")
    assert log.last[0] == "line 5"
    log.begin("again")
    assert not log.last


@pytest.fixture
def pipe():
    """A screen's channel, and what was written to it."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    yield writer, lambda: os.read(reader, 1 << 16).decode()
    os.close(reader)


def test_notices_are_left_out_on_a_terminal_too(pipe):
    channel, written = pipe
    screen = Screen(hidden=("I0000 ",))
    screen.line(channel, 1, "I0000 of the build")
    screen.line(channel, 1, "a line")
    screen.live(channel, 0, "I0000 of the")
    screen.live(channel, 0, " build\nanother\nI0000 b\nlast")
    assert written() == "[1] a line\n[0] another\n[0] last"


def test_orders_to_the_terminal_alone_begin_no_line(pipe):
    """As a bar that has ended shows the cursor again."""
    channel, written = pipe
    screen = Screen()
    screen.live(channel, 0, "\x1b[?25lbar\n")
    screen.live(channel, 0, "\x1b[?25h")
    screen.close()
    assert written() == "[0] \x1b[?25lbar\n\x1b[?25h"


def test_a_quiet_screen_shows_what_the_launcher_says_alone(pipe, capfd):
    channel, written = pipe
    screen = Screen(hidden=("",))
    screen.line(channel, 1, "a line")
    screen.live(channel, 0, "another\nthe last")
    screen.note("this")
    assert capfd.readouterr().err == "syncbn launch: this\n"
    os.write(channel, b"nothing before")
    assert written() == "nothing before"


def test_a_screen_whose_reader_has_gone_is_written_to_no_more():
    reader, writer = os.pipe()
    os.close(reader)
    screen = Screen()
    for _ in range(2):
        screen.line(writer, 0, "nobody reads this")  # no error, no end by SIGPIPE
    os.close(writer)


def test_marks_of_launches_within_launches_are_all_kept():
    environment = with_mark(with_mark({}, "outer"), "inner")
    assert environment[MARK] == "outer:inner"


def test_where_there_is_no_posix_the_other_commands_work():
    code = "import sys; sys.modules.update(dict.fromkeys(('fcntl', 'pty', 'termios')))\n"
    code += "from syncbn.cli import main; main(['launch', '--help'])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert shown.returncode == 0, shown.stderr.decode()


def test_a_chief_that_is_killed_leaves_the_terminal_as_it_was(pipe):
    channel, written = pipe
    screen = Screen(hidden=("I0000 ",))
    screen.live(channel, 0, "\x1b[?25l\r1/3 ━━")  # as rich's bars hide the cursor
    screen.close()
    assert written() == "[0] \x1b[?25l\r1/3 ━━\n\x1b[?25h"
    screen.live(channel, 0, "I0000 half of a no")
    screen.close()
    screen.live(channel, 0, "the next chief\n")
    assert written() == "[0] the next chief\n"


def test_a_line_that_never_ends_is_given_in_parts():
    lines = Lines()
    parts = [part for _ in range(20) for part in lines.feed("\r" * (not lines.rest) + "x" * 9000)]
    assert parts
    assert len(lines.rest) < 100_000


def test_a_disk_that_is_full_is_told_once_and_ends_nothing():
    told = []
    with pathlib.Path("/dev/full").open("wb", buffering=0) as full:
        log = Log(full, told.append)
        log.begin("start")
        log.add("a line")
    assert list(log.last) == ["a line"]
    (message,) = told
    assert "No space left on device at /dev/full" in message


def test_a_reader_that_reads_no_more_is_not_waited_for_at_the_end():
    reader, writer = os.pipe()
    looked = []
    screen = Screen(is_ending=lambda: bool(looked.append(None) or len(looked) > 1))
    screen.line(writer, 0, "x" * (1 << 20))  # more than any pipe holds
    assert len(looked) == 2
    screen.line(writer, 0, "lost")
    os.close(writer)
    os.close(reader)


def test_descriptors_beyond_those_of_select_are_looked_at():
    """With 300 workers there are more than 1023."""
    reader, writer = os.pipe()
    far = fcntl.fcntl(reader, fcntl.F_DUPFD, 1100)
    assert not has_data(far)
    os.write(writer, b"x")
    assert has_data(far)
    for descriptor in (reader, writer, far):
        os.close(descriptor)


def test_a_slow_server_for_names_holds_nothing_up(monkeypatch):
    answer = threading.Event()
    found = socket.getaddrinfo

    def slow(host, *arguments, flags=0, **options):
        if not flags:
            answer.wait(30)
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return found(host, *arguments, flags=flags, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    monkeypatch.setattr(arrival, "_PERIOD", 0)
    looking = arrival.Arrival(ClusterSpec(("nowhere:1",), "nowhere:2", (0,)), 10)
    looking.look()  # would wait here
    assert looking.found(0) == "its name is being looked up"
    answer.set()
    for _ in range(100):
        looking.look()
        if looking.found(0) == "no such name":
            break
        time.sleep(0.05)
    assert looking.found(0) == "no such name"


@pytest.mark.parametrize(("together", "found"), [(0.0, 3), (60.0, 2)])
def test_a_signal_that_comes_two_ways_is_one(pipe, together, found):
    """Slurm's to all processes of a task, and the launcher's that hands it on."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        control = Control(pipe[0])
        control.together = together
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert len(control.asked) == found
    assert control.asked[-1] == signal.SIGHUP
