"""`syncbn launch` with real processes, which need no framework."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from tests.multiprocess.launching import START, all_ready, wait_until

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]


def test_every_worker_is_told_the_cluster_in_the_words_of_each_framework(launch):
    program = (
        START + "pathlib.Path(f'{RANK}.json').write_text(json.dumps([*sys.argv, {**os.environ}]))"
    )
    one = launch(program, "--workers", "3", "--timeout", "77", arguments=("--epochs", "3", "-m"))
    result = one.run()
    assert result.returncode == 0, result.stderr
    found = [json.loads((one.folder / f"{rank}.json").read_text()) for rank in range(3)]
    configs = [json.loads(environment["TF_CONFIG"]) for *_, environment in found]
    addresses = configs[0]["cluster"]["worker"]
    assert len(set(addresses)) == 3
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+", address) for address in addresses)
    for rank, (_, *arguments, environment) in enumerate(found):
        assert arguments == ["--epochs", "3", "-m"]
        assert configs[rank] == {
            "cluster": {"worker": addresses},
            "task": {"type": "worker", "index": rank},
        }
        assert environment["RANK"] == environment["LOCAL_RANK"] == str(rank)
        assert environment["KERAS_DISTRIBUTION_PROCESS_ID"] == str(rank)
        assert environment["WORLD_SIZE"] == environment["KERAS_DISTRIBUTION_NUM_PROCESSES"] == "3"
        rendezvous = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
        assert environment["KERAS_DISTRIBUTION_JOB_ADDRESSES"] == rendezvous
        assert rendezvous not in addresses
        assert environment["SYNCBN_TIMEOUT"] == "77.0"
        share = str(max(1, len(os.sched_getaffinity(0)) // 3))
        assert environment["OMP_NUM_THREADS"] == environment["TF_NUM_INTRAOP_THREADS"] == share


def test_what_the_user_has_set_stands(launch):
    one = launch(START + "print(os.environ['OMP_NUM_THREADS'])", "--workers", "1")
    one.environment["OMP_NUM_THREADS"] = "7"
    assert one.run().stdout == "[0] 7\n"


def test_a_module_runs_as_python_m_would(launch):
    one = launch("", "--workers", "2")
    (one.folder / "package").mkdir()
    (one.folder / "package" / "__main__.py").write_text("import sys; print(sys.argv[1:])")
    # A file that would be taken for a module of the standard library.
    (one.folder / "selectors.py").write_text("raise RuntimeError('taken for the library')")
    one.command[-1:] = ["-m", "package", "--epochs", "3"]
    result = one.run()
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == [f"[{w}] ['--epochs', '3']" for w in (0, 1)]


BAR = (
    START
    + r"""
print("Epoch 1/2")
for step in range(3):
    print("\b" * 4 + f"\r{step}/2 ━━", end="")
print(f"\nsaid {RANK}")
print(f"complained {RANK}", file=sys.stderr)
print("no end", end="")
"""
)


def test_output_is_prefixed_and_the_bar_is_the_chiefs_alone(launch):
    one = launch(BAR, "--workers", "2", "--log-dir", "logs")
    result = one.run()
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.startswith("[0] ")] == [
        *("[0] Epoch 1/2", "[0] 2/2 ━━", "[0] said 0", "[0] no end")
    ]
    assert [line for line in lines if line.startswith("[1] ")] == ["[1] said 1", "[1] no end"]
    assert {"[0] complained 0", "[1] complained 1"} <= set(result.stderr.splitlines())
    log = (one.folder / "logs" / "worker-1.log").read_text().splitlines()
    assert log[0].startswith("=== ")
    assert sorted(log[1:]) == sorted(["Epoch 1/2", "2/2 ━━", "said 1", "complained 1", "no end"])


def test_on_a_terminal_the_chief_has_one_and_its_bar_is_drawn_again_below_others(launch):
    program = (
        START
        + r"""
print("terminal", sys.stdout.isatty(), sys.stderr.isatty())
if RANK == 0:
    print("\r1/2 ━━", end=""); ready()
    while not os.path.exists("ready1-0"): time.sleep(0.01)
    time.sleep(0.5)
    print("\r2/2 ━━")
else:
    while not os.path.exists("ready0-0"): time.sleep(0.01)
    time.sleep(0.3); print("meanwhile"); ready()
"""
    )
    one = launch(program, "--workers", "2")
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        one.command, env=one.environment, cwd=one.folder, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            data = os.read(ours, 1 << 16)
        except OSError:
            break
        if not data:
            break
        shown += data
    os.close(ours)
    assert process.wait() == 0
    text = shown.decode()
    assert "[0] terminal True True" in text
    assert "[1] terminal False False" in text
    assert "\r\x1b[K[1] meanwhile\r\n1/2 ━━" in text
    assert text.endswith("\r2/2 ━━\r\n")


FAILS = (
    START
    + """
if RANK == 1:
    ready()
    while not os.path.exists("ready0-0"): time.sleep(0.01)
    print("the reason", file=sys.stderr)
    END
if DEAF: signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("waiting"); ready(); time.sleep(60)
"""
)


def failing(end, deaf=False):
    return FAILS.replace("END", end).replace("DEAF", str(deaf))


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        ("sys.exit(3)", 3, "ended with exit code 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "was killed by SIGKILL (exit code 137)"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 139, "was killed by SIGSEGV (exit code 139)"),
    ],
)
def test_the_first_that_fails_ends_the_others_and_its_end_is_the_launchers(
    launch, end, code, words
):
    result = launch(failing(end), "--workers", "2").run(20)
    assert result.returncode == code
    assert re.search(rf"worker 1 \(127\.0\.0\.1:\d+\) {re.escape(words)}", result.stderr)
    assert "its last lines:\nsyncbn" not in result.stderr
    assert "\n    the reason\n" in result.stderr


def test_a_worker_that_is_deaf_to_sigterm_is_killed_after_the_grace(launch):
    program = failing("sys.exit(3)", deaf=True)
    assert launch(program, "--workers", "2", "--grace", "0.5").run(20).returncode == 3


def test_the_group_is_started_again_until_it_ends_well(launch):
    program = START + "print('try', TRY); ready(); sys.exit(5 if TRY < 2 and RANK == 1 else 0)"
    result = launch(program, "--workers", "2", "--max-restarts", "4").run()
    assert result.returncode == 0
    assert "restarting all workers (2 of 4)" in result.stderr
    assert "(3 of 4)" not in result.stderr
    assert "[1] try 2" in result.stdout


def test_restarts_come_to_an_end(launch):
    result = launch(START + "sys.exit(5)", "--workers", "2", "--max-restarts", "2").run()
    assert result.returncode == 5
    assert result.stderr.count("restarting all workers") == 2


CHILDREN = (
    START
    + """
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
ready()
"""
)


def test_what_workers_have_started_does_not_survive_them(launch):
    one = launch(CHILDREN, "--workers", "2")
    assert one.run(20).returncode == 0
    assert not one.processes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_all(launch, number):
    program = (
        CHILDREN
        + """
try:
    time.sleep(60)
except KeyboardInterrupt:
    pathlib.Path(f"interrupted{RANK}").touch()
    raise
"""
    )
    one = launch(program, "--workers", "2", "--max-restarts", "3")
    process = one.start()
    assert wait_until(all_ready(one))
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert f"interrupted by {number.name}; all workers have ended" in output
    assert "[1] Traceback" not in output
    if number == signal.SIGINT:
        assert all((one.folder / f"interrupted{w}").exists() for w in (0, 1))
    assert not one.processes()


def test_a_second_ctrl_c_does_not_wait(launch):
    deaf = START + "signal.signal(signal.SIGINT, signal.SIG_IGN); ready(); time.sleep(60)"
    one = launch(deaf, "--workers", "2", "--grace", "50")
    process = one.start()
    assert wait_until(all_ready(one))
    process.send_signal(signal.SIGINT)
    with pytest.raises(Exception, match="timed out"):
        process.wait(1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130


def supervisor_of(process):
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    with pathlib.Path(children).open() as file:
        return int(file.read().split()[0])


@pytest.mark.parametrize("killed", ["launcher", "supervisor"])
def test_nothing_survives_the_launcher_even_when_it_is_killed(launch, killed):
    one = launch(CHILDREN + "time.sleep(60)", "--workers", "2")
    process = one.start()
    assert wait_until(all_ready(one))
    supervisor = supervisor_of(process)
    assert len(one.processes()) >= 8
    os.kill(process.pid if killed == "launcher" else supervisor, signal.SIGKILL)
    assert wait_until(lambda: not one.processes(), 5)
    output, _ = process.communicate(timeout=5)
    if killed == "supervisor":
        assert process.returncode == 137
        assert "was killed by SIGKILL (exit code 137); all workers were ended" in output


def test_it_is_said_who_goes_on_when_the_others_have_ended_well(launch):
    one = launch(START + "time.sleep(2 * (RANK == 0))", "--workers", "2", "--timeout", "0.5")
    result = one.run()
    assert result.returncode == 0
    assert re.search(r"still waiting for worker 0 \(127\S+\); the others ended well", result.stderr)
