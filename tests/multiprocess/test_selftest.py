"""`syncbn selftest` passes, and convicts a library that is broken."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from syncbn.cli import main
from syncbn.errors import InputError
from syncbn.selftest.checks import CHECKS, Finding, check_steps, selected
from syncbn.selftest.soak import Usage, growth
from tests.multiprocess.cluster import run_processes

pytestmark = pytest.mark.multiprocess


# By mutant: how many workers, and what they are given.
RUNS = {
    "local": (2, ["--only", "layer,fit,uneven"]),
    "raising": (2, ["--only", "layer,fit"]),
    "leaky": (1, ["--only", "soak", "--steps", "100"]),
}


@pytest.fixture(scope="module")
def ended():
    """By mutant the exit codes of all workers and what they wrote; two runs at a time."""

    def run(mutant):
        workers, arguments = RUNS[mutant]
        script = "tests.multiprocess.workers.selftest_mutant"
        command = [sys.executable, "-m", script, mutant, *arguments]
        results = run_processes(command, workers, timeout=120, grace=20)
        return [result.status for result in results], [result.output for result in results]

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(RUNS, pool.map(run, RUNS), strict=True))


def lines(output):
    names = tuple(f"{check.name} " for check in CHECKS)
    return {line.split()[0]: line for line in output.splitlines() if line.startswith(names)}


@pytest.mark.survival
def test_local_statistics_fail_it_on_every_worker_with_the_reason(ended):
    codes, outputs = ended["local"]
    assert codes == [1, 1], outputs
    assert all(line.endswith(" FAILED") for line in lines(outputs[0]).values())
    assert len(lines(outputs[0])) == 3
    for worker, output in enumerate(outputs):
        assert f"worker {worker}: layer: float64: gap to NumPy  " in output
        assert f"worker {worker}: fit: weights: gap to NumPy" in output


@pytest.mark.survival
def test_an_error_of_one_worker_ends_all_of_them_with_its_words(ended):
    codes, outputs = ended["raising"]
    assert codes == [1, 1], outputs
    assert "LookupError: no table of labels" in outputs[1]
    assert "worker 1" in outputs[0]


@pytest.mark.survival
def test_a_leak_fails_the_soak_of_one_worker(ended):
    codes, outputs = ended["leaky"]
    assert codes == [1], outputs
    assert lines(outputs[0])["soak"].endswith(" FAILED")
    for what in ("MiB of memory more", "open files more"):
        assert f"worker 0: soak: {what}" in outputs[0]
    assert "soak: threads more" not in outputs[0]


@pytest.mark.parametrize(
    "names",
    [
        "layer,fit",
        pytest.param(
            ",".join([*(check.name for check in CHECKS), "resume"]), marks=pytest.mark.survival
        ),
    ],
    ids=["some", "all"],
)
def test_every_check_passes_on_two_workers_and_the_chief_prints_the_table(names, capfd):
    assert main(["selftest", "--only", names, "--steps", "100", "--timeout", "120"]) == 0
    table, said = capfd.readouterr()
    verdicts = [line for line in table.splitlines() if line.endswith(" ok")]
    assert [line.removeprefix("[0] ").split()[0] for line in verdicts] == [
        *names.split(","),
    ]
    assert "FAILED" not in table
    assert "[1]" not in table
    assert "syncbn selftest: 2 worker(s), 2 replica(s)" in table
    assert ("was killed by SIGKILL (exit code 137)" in said) == ("resume" in names)
    assert "Traceback" not in said


@pytest.mark.survival
def test_two_thousand_steps_on_two_workers_leave_nothing(capfd):
    assert main(["selftest", "--only", "soak", "--steps", "2000"]) == 0
    table = capfd.readouterr().out
    grown = float(table.split("MiB of memory more")[1].split()[0])
    # TensorFlow's records of collectives alone were 16 MiB more.
    assert grown < 6


def test_the_command_refuses_what_cannot_be_before_it_starts_anything(capsys):
    assert main(["selftest", "--only", "nonsense"]) == 2
    assert "--only requires names of checks: layer, fit" in capsys.readouterr().err
    assert main(["selftest", "--steps", "3"]) == 2
    assert "--steps requires at least" in capsys.readouterr().err


def test_a_selection_keeps_the_tables_order_and_a_bound_takes_no_nan():
    assert [check.name for check in selected("fit, layer")] == ["layer", "fit"]
    with pytest.raises(InputError):
        check_steps(0)
    assert Finding("gap", 1.0, 1.0).holds
    assert not Finding("gap", np.nan, 1.0).holds
    assert not Finding("gap", np.inf, np.inf).holds


def test_growth_is_between_the_first_quarter_and_the_end():
    samples = [Usage(50.0 if i < 5 else 100.0 + i, 7, 3) for i in range(80)]
    grown = growth(samples)
    assert grown.mebibytes == pytest.approx(60, abs=1)
    assert grown[1:] == (0, 0)
