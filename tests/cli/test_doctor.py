"""`syncbn doctor` as a user runs it: where TensorFlow works, and where it is missing or broken."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests import doctor_facts, doctor_rows

import syncbn
from syncbn import doctor
from syncbn.cli import main

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "syncbn", "doctor"]


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A package of that name, which is found before the one that is installed."""
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT / "src")]))
    for name in ("TF_CONFIG", "MASTER_ADDR", "MASTER_PORT", "TF_USE_LEGACY_KERAS"):
        monkeypatch.delenv(name, raising=False)

    def make(code, name="tensorflow"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").write_text(code)

    return make


def asked(capsys, *options):
    """The exit code and the report of the command in this process."""
    code = main(["doctor", "--json", *options])
    document = json.loads(capsys.readouterr().out)
    assert document["exit_code"] == code
    assert document["available"] is {0: True, 1: False, 2: None}[code]
    return code, document


@pytest.mark.parametrize(
    ("code", "said", "advice"),
    [
        ("raise ImportError('libcudart.so.12: cannot open')", "libcudart.so.12", "reinstall"),
        ("raise RuntimeError('of another NumPy')", "of another NumPy", "reinstall"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV", "reinstall"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "SIGILL", "newer CPU"),
        ("import os; os._exit(3)", "failed", "reinstall"),
        ("", "failed (AttributeError", "reinstall"),
    ],
)
def test_a_broken_tensorflow_is_said(fake, capsys, code, said, advice):
    fake(code)
    status, document = asked(capsys)
    assert status == 2
    assert document["sentence"].startswith("Cannot tell: ")
    assert said in document["sentence"]
    assert "'import tensorflow'" in document["sentence"]
    errors = [finding for finding in document["findings"] if finding["level"] == "error"]
    assert any(advice in finding["do"] for finding in errors)
    assert document["table"]["native"]  # what these versions are to have is said all the same


def test_a_slow_tensorflow_is_given_up_with_all_that_it_has_started(fake, capsys, tmp_path):
    fake(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)"
    )
    started = time.monotonic()
    code, document = asked(capsys, "--timeout", "1.5")
    assert time.monotonic() - started < 20
    assert code == 2
    assert "'import tensorflow' did not end within 2 s" in document["sentence"]
    assert any("--timeout" in finding["do"] for finding in document["findings"])
    assert is_gone(int((tmp_path / "pid").read_text()))


def is_gone(pid):
    """Whether the process has ended; one that nobody has waited for yet has."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_where_nothing_is_installed_that_is_the_answer():
    """Without site-packages there is neither Keras nor a framework, nor NumPy."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "KERAS_BACKEND": ""}
    ended = subprocess.run(
        [sys.executable, "-S", "-m", "syncbn", "doctor"],
        env={**environment, "KERAS_HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout.startswith("Cannot tell: TensorFlow is not installed.\n")
    assert "pip install 'syncbn[tensorflow]'" in " ".join(ended.stdout.split())


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ending_the_doctor_ends_what_it_has_started(fake, tmp_path, sent):
    fake(
        f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()) + ' ')\n"
        "time.sleep(600)"
    )
    process = subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        pid = tmp_path / "pid"
        deadline = time.monotonic() + 60
        while not (pid.exists() and pid.read_text().endswith(" ")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(sent)
        _, errors = process.communicate(timeout=30)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    assert process.returncode == 128 + sent
    assert "Traceback" not in errors
    assert is_gone(int(pid.read_text()))


@pytest.mark.survival
def test_what_a_killed_doctor_leaves_ends_by_itself(fake, tmp_path):
    """Nobody is left to end it."""
    fake(
        f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()) + ' ')\n"
        "time.sleep(600)"
    )
    process = subprocess.Popen([*COMMAND, "--timeout", "3"], stdout=subprocess.DEVNULL)
    pid = tmp_path / "pid"
    deadline = time.monotonic() + 30
    while not (pid.exists() and pid.read_text().endswith(" ")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    child = int(pid.read_text())
    assert Path(f"/proc/{child}").exists()
    time.sleep(8)
    assert is_gone(child)


def test_wrong_settings_and_a_broken_framework_are_said_together(fake, capsys, monkeypatch):
    """And the framework is tried without them, or it would wait for the others."""
    fake("import os\nraise ImportError(sorted({'TF_CONFIG', 'RANK', 'PATH'} & {*os.environ}))")
    monkeypatch.setenv("TF_CONFIG", "{")
    monkeypatch.setenv("RANK", "0")
    code, document = asked(capsys)
    assert code == 2
    assert "ImportError: ['PATH']" in document["sentence"]
    assert "TF_CONFIG" in {finding["about"] for finding in document["findings"]}


def test_with_tensorflow_given_no_framework_is_looked_at(fake, capsys):
    fake("raise SystemExit('looked at')")
    assert main(["doctor", "--tensorflow", "2.9"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("Yes: TensorFlow 2.9 has ")
    assert printed.err == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tensorflow", "two"], "The version of TensorFlow requires numbers"),
        (["--tensorflow", "2.9", "--legacy"], "--legacy requires TensorFlow 2.16"),
        (["--tensorflow", "2.9", "--backend", "jax"], "--tensorflow requires to be alone"),
        (["--keras", "3.1"], "--keras and --legacy require --tensorflow"),
        (["--legacy"], "--keras and --legacy require --tensorflow"),
        (["--timeout", "0"], "--timeout requires seconds above 0"),
        (["--timeout", "nan"], "--timeout requires seconds above 0"),
        (["--peers-timeout", "-1"], "--peers-timeout requires seconds above 0"),
    ],
)
def test_bad_input_is_one_line_and_looks_at_nothing(capsys, options, said):
    assert main(["doctor", *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    line = printed.err.splitlines()[-1]
    assert line.startswith("syncbn: error: ")
    assert said in line


def test_a_reader_that_has_seen_enough_gets_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        [*COMMAND, "--tensorflow", "2.9"], stdout=writer, stderr=subprocess.PIPE, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, "")


# ---- the TensorFlow that is installed ----


@pytest.fixture(scope="module")
def installed():
    """The report of the doctor on this machine, and what it said meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "tensorflow")
        for name in ("TF_CONFIG", "MASTER_ADDR", "MASTER_PORT", "TF_USE_LEGACY_KERAS"):
            patch.delenv(name, raising=False)
        told = []
        return doctor.diagnose(progress=told.append), told


def test_here_it_is_available(installed):
    report, told = installed
    assert report.exit_code == 0, report.sentence
    assert report.trouble == ""
    assert report.sentence.startswith("Yes: syncbn.SyncBatchNormalization() synchronizes here")
    layers = {layer.role: layer for layer in report.tried}
    assert layers["ours"].failing() == []
    assert layers["plain"].failing() == list(layers["plain"].cases)
    assert len(layers["ours"].cases) == 4
    assert layers["ours"].cases["equal parts"]["moving_spread"] == 0
    assert report.facts["devices"]
    assert "import tensorflow" in told


def test_the_row_of_the_installed_version_says_what_this_version_does(installed):
    import tensorflow as tf

    report, _ = installed
    facts = {**doctor_facts.layers(tf), "tried": report.tried, "fit": None}
    subject = doctor.Subject.of_versions(tf.__version__, syncbn.layer.keras.__version__, False)
    assert doctor_rows.departures(subject, facts) == []
    assert str(subject) == report.about
    # And the check sees a row that is another version's.
    assert doctor_rows.departures(doctor.Subject.of_versions("2.13", None, False), facts)


def test_each_defect_of_the_table_shows_somewhere_or_is_excused():
    names = {defect.name for defect in doctor.read().defects}
    assert names == {*doctor_rows.SHOWS} | doctor_rows.NOT_SHOWN_HERE


def test_the_json_has_what_the_page_says(installed):
    document = json.loads(json.dumps(installed[0].as_dict()))
    page = (ROOT / "docs" / "how-to" / "doctor.md").read_text(encoding="utf-8")
    section = page.partition("## The report as JSON\n")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)
    assert listed == list(document)


# ---- layers that do not synchronize ----

LOCAL = "from keras.layers import BatchNormalization as SyncBatchNormalization\n"


def test_a_layer_that_does_not_synchronize_is_convicted(fake, capsys):
    """On JAX, which starts soonest; under shard_map, where plain BatchNormalization is local."""
    fake(LOCAL, name="syncbn")
    code, document = asked(capsys, "--backend", "jax")
    assert code == 1
    assert document["sentence"].startswith(
        "No: syncbn.SyncBatchNormalization(), shard_map does not synchronize here with equal parts"
    )


@pytest.mark.frameworks
@pytest.mark.parametrize("backend", ["jax", "torch", "tensorflow"])
def test_a_mutant_is_convicted_on_every_backend_and_ours_acquitted(fake, capsys, backend):
    code, document = asked(capsys, "--backend", backend)
    assert code == 0, document["sentence"]
    assert {"ours", "plain"} <= {layer["role"] for layer in document["tried"]}
    fake(LOCAL, name="syncbn")
    code, document = asked(capsys, "--backend", backend)
    assert code == 1
    assert document["sentence"].startswith("No: syncbn.SyncBatchNormalization()")


@pytest.mark.frameworks
def test_the_legacy_keras_is_tried_with_the_layer_of_tf_keras(fake, capsys, monkeypatch):
    fake("", name="unused")
    monkeypatch.setenv("TF_USE_LEGACY_KERAS", "1")
    code, document = asked(capsys)
    assert code == 0
    assert "with tf_keras" in document["about"]
    names = [layer["name"] for layer in document["tried"] if layer["role"] != "plain"]
    assert names[-1] == "syncbn.tf_keras.SyncBatchNormalization()"
    assert len(names) == 3
