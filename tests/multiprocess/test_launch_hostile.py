"""Programs and surroundings that would break a launcher: none is left, none is waited for."""

import os
import pathlib
import re
import signal
import sys
import textwrap
import time

import pytest

from tests.multiprocess.launching import START, all_ready, wait_until

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]


def test_a_child_that_writes_for_ever_does_not_keep_the_launcher(launch):
    program = START + "subprocess.Popen(['yes']); time.sleep(0.2); sys.exit(3)"
    one = launch(program, "--workers", "1")
    assert one.run(30).returncode == 3


STRANGER = (
    START
    + """
# A session of its own, a parent that has ended, an environment without any mark.
code = (
    "import os, sys, time; os.fork() and os._exit(0)\\n"
    "open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
)
subprocess.run([sys.executable, "-c", code, f"stranger{RANK}"], env={}, start_new_session=True)
while not os.path.exists(f"stranger{RANK}") or not os.path.getsize(f"stranger{RANK}"):
    time.sleep(0.01)
ready()
"""
)


@pytest.mark.parametrize("killed", [False, True], ids=["at the end", "launcher killed"])
def test_what_has_cut_every_tie_does_not_survive_either(launch, killed):
    one = launch(STRANGER + "time.sleep(60 * KILLED)".replace("KILLED", str(killed)))
    process = one.start()
    assert wait_until(all_ready(one))
    if killed:
        process.kill()
    process.communicate(timeout=20)
    for rank in (0, 1):
        stranger = pathlib.Path("/proc", (one.folder / f"stranger{rank}").read_text())
        assert wait_until(lambda stranger=stranger: not stranger.exists())


def test_orphans_that_have_ended_leave_the_process_table(launch):
    program = (
        START
        + """
code = "import os, time; os.fork() and os._exit(0); time.sleep(0.5)"
subprocess.run([sys.executable, "-c", code])
ready(); time.sleep(60)
"""
    )
    one = launch(program)
    process = one.start()
    assert wait_until(all_ready(one))
    supervisor = children_of(process.pid)[0]
    assert wait_until(lambda: len(children_of(supervisor)) == 2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)


def children_of(process):
    return list(
        map(int, pathlib.Path(f"/proc/{process}/task/{process}/children").read_text().split())
    )


def test_workers_end_with_the_supervisor_even_where_the_launcher_cannot_act(launch):
    one = launch(START + "ready(); time.sleep(60)")
    process = one.start()
    assert wait_until(all_ready(one))
    process.send_signal(signal.SIGSTOP)
    os.kill(children_of(process.pid)[0], signal.SIGKILL)
    assert wait_until(lambda: len(one.processes()) == 1)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=20)


def test_a_process_whose_parent_has_ended_before_ends(launch):
    one = launch("from syncbn.launch.reaping import tie_to_parent; tie_to_parent(-1)")
    one.command[1:] = ["program.py"]
    assert one.run(30).returncode == -signal.SIGKILL


def test_a_fork_of_the_caller_does_not_hide_its_end(launch):
    """It inherits the pipe whose closing tells the supervisor."""
    one = launch(START + "ready(); time.sleep(60)")
    code = textwrap.dedent("""
        import os, sys, threading, time
        from syncbn.launch import LaunchSettings, launch
        command = [sys.executable, "program.py"]
        threading.Thread(target=launch, args=(command, LaunchSettings())).start()
        while not os.path.exists("ready1-0"): time.sleep(0.01)
        os.fork() and open("forked", "w")
        time.sleep(60)
    """)
    one.command[1:] = ["-c", code]
    process = one.start()
    assert wait_until(lambda: all_ready(one)() and (one.folder / "forked").exists())
    process.kill()
    assert wait_until(lambda: len(one.processes()) == 1)
    one.kill_all()
    process.communicate(timeout=20)


def test_where_processes_cannot_be_looked_at_their_groups_are_ended(launch):
    """As on macOS."""
    program = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); ready()"
    one = launch(START + program)
    blind = (
        "import pathlib, sys; from syncbn.launch import reaping, supervisor\n"
        "reaping._PROCESSES = pathlib.Path('/nowhere'); sys.exit(supervisor.main())"
    )
    code = textwrap.dedent(f"""
        import subprocess, sys
        from syncbn.launch import LaunchSettings, front, launch
        front._start_supervisor = lambda: subprocess.Popen(
            [sys.executable, "-c", {blind!r}], stdin=subprocess.PIPE, start_new_session=True
        )
        sys.exit(launch([sys.executable, "program.py"], LaunchSettings()))
    """)
    one.command[1:] = ["-c", code]
    process = one.start()
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert all_ready(one)()
    assert wait_until(lambda: not one.processes())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_reader_that_reads_no_more_keeps_nobody_alive(launch, number):
    one = launch(START + "ready()\nwhile True: print('x' * 200)")
    process = one.start()
    assert wait_until(all_ready(one))
    time.sleep(0.5)  # the pipe is full now
    process.send_signal(number)
    process.wait(30)
    assert wait_until(lambda: not one.processes())
    process.stdout.close()


def test_a_process_that_ignores_sigchld_is_told_the_truth(launch):
    def ignore():
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)

    result = launch(START + "sys.exit(3)").run(30, preexec_fn=ignore)
    assert result.returncode == 3, result.stderr


def test_a_hang_up_that_is_ignored_is_not_handed_on(launch):
    one = launch(START + "ready()\nwhile not os.path.exists('go'): time.sleep(0.05)")
    process = one.start(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert wait_until(all_ready(one))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    (one.folder / "go").touch()
    process.communicate(timeout=20)
    assert process.returncode == 0


def test_without_any_output_it_runs_as_well(launch):
    one = launch(
        START
        + "print('x' * 100); print('y', file=sys.stderr); ready()\n"
        # The one that fails ends the other.
        + "while not os.path.exists('ready0-0'): time.sleep(0.01)\n"
        + "sys.exit(RANK * 4)"
    )
    one.command[-1:-1] = ["--log-dir", "logs"]
    script = 'exec "$@" <&- >&- 2>&-'
    one.command[:0] = ["/bin/sh", "-c", script, "sh"]
    assert one.run(30).returncode == 4
    assert all_ready(one)()
    # A file that took the number of standard output would have the screen's lines as well.
    for log in (one.folder / "logs").iterdir():
        assert "[" not in log.read_text()


def test_a_signal_before_anything_has_started_is_not_lost(launch):
    """The supervisor holds it until it knows what to do."""
    one = launch(START + "time.sleep(60)")
    one.command[1:] = [
        "-c",
        textwrap.dedent("""
            import os, signal, subprocess, sys
            from syncbn.launch import LaunchSettings, front, launch
            start = front._start_supervisor
            def and_signal():
                started = start()
                os.kill(os.getpid(), signal.SIGINT)
                started.send_signal(signal.SIGTERM)
                return started
            front._start_supervisor = and_signal
            sys.exit(launch([sys.executable, "program.py"], LaunchSettings()))
        """),
    ]
    result = one.run(30)
    assert "syncbn/launch" not in result.stderr  # as in a traceback of the launcher's own
    assert result.returncode in {130, 143}
    assert re.search("interrupted by SIG(TERM|INT)", result.stderr)


def test_the_supervisor_finds_the_package_that_its_caller_found(launch):
    one = launch("print('ran')")
    source = one.environment.pop("PYTHONPATH").split(os.pathsep)[0]
    code = (
        f"import sys; sys.path.insert(0, {source!r})\n"
        "from syncbn.launch import LaunchSettings, launch\n"
        "sys.exit(launch([sys.executable, 'program.py'], LaunchSettings(workers=1)))"
    )
    one.command[1:] = ["-I", "-S", "-c", code]
    result = one.run(30)
    assert result.stdout == "[0] ran\n", result.stderr


def test_too_few_open_files_are_said(launch):
    one = launch("", "--workers", "40")
    one.command[:0] = ["/bin/sh", "-c", 'ulimit -n 32; exec "$@"', "sh"]
    result = one.run(30)
    assert result.returncode == 2
    assert "Received: Too many open files" in result.stderr
    assert "Traceback" not in result.stderr


def test_everything_after_the_program_is_its_own(launch):
    one = launch("", "--workers", "1")
    (one.folder / "-x.py").write_text("import sys; print(sys.argv[1:])")
    one.command[-1:] = ["--", "-x.py", "--", "-m", "", "--workers", "9", "ü\n", "--"]
    result = one.run(30)
    assert result.stdout == "[0] ['--', '-m', '', '--workers', '9', 'ü\\n', '--']\n", result.stderr
