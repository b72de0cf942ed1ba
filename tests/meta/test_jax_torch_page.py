"""docs/how-to/jax-torch.md is true: its programs run, on four devices and on two processes."""

import re
from pathlib import Path

import pytest
from tests.processes import python

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "jax-torch.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```([\w ]+)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
JAX = [number for number, (language, _) in enumerate(BLOCKS) if language == "python jax"]
PROCESSES = [code for language, code in BLOCKS if language == "python torch workers"]


@pytest.mark.parametrize("number", JAX)
def test_every_program_for_jax_prints_what_the_page_says(number):
    flags = "--xla_force_host_platform_device_count=4"
    printed = python(BLOCKS[number][1], KERAS_BACKEND="jax", XLA_FLAGS=flags)
    language, text = BLOCKS[number + 1]
    assert language == "text"
    assert printed == text


@pytest.mark.frameworks
@pytest.mark.multiprocess
@pytest.mark.parametrize("code", PROCESSES, ids=["a loop", "fit"])
def test_every_program_for_torch_runs_on_two_processes(launch, code):
    result = launch(code, "--backend", "torch", "--workers", "2").run(120)
    assert result.returncode == 0, result.stderr
    assert {"[0] the same: True", "[1] the same: True"} <= set(result.stdout.splitlines())
