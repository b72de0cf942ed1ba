"""The wheel and the source archive are whole, install in empty environments, and do their job.

The environments are new ones, filled by pip from its registry with the versions that the rest of
the suite runs on; nothing of this checkout is on their path.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# What Python leaves in a checkout.
LEFT = {"__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
# What packaging needs of a checkout and what its users look for in a source archive.
ARCHIVED = ["src", "tests", "benchmarks", "docs", "examples"]

pytestmark = pytest.mark.timeout(600)


def run(*command, folder, expected=0):
    """What a command prints, in a folder and with an environment that know nothing of syncbn."""
    hidden = {"PYTHONPATH", "KERAS_BACKEND", "SYNCBN_KERAS", "VIRTUAL_ENV"}
    clean = {name: value for name, value in os.environ.items() if name not in hidden}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**clean, "KERAS_HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert result.returncode == expected, result.stdout + result.stderr
    return result.stdout


def files_under(folder):
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and not LEFT & {*path.parts} and path.suffix != ".pyc"
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source archive, and the wheel built out of that archive, as a release has them."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, folder=folder)
    (archive,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return archive, wheel


def new_environment(folder, requirement, *options):
    """Its Python, with the requirement installed and nothing else."""
    venv.create(folder, with_pip=True, clear=True)
    python = folder / "bin" / "python"
    pip = (python, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-compile", *options, requirement, folder=folder)
    run(*pip, "check", folder=folder)
    return python


def constraints(folder):
    """The versions of `requirements.lock`; of TensorFlow the build that the extra asks for."""
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    pins = re.findall(r"^[\w.\[\]-]+==[^\s;]+", lock, re.MULTILINE)
    path = folder / "constraints.txt"
    path.write_text("\n".join(pins).replace("tensorflow-cpu==", "tensorflow=="), encoding="utf-8")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {f"src/{name}" for name in names} == files_under("src")
    assert "syncbn/py.typed" in names


def test_the_archive_holds_all_that_a_checkout_has_to_build_test_and_document(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ARCHIVED:
        assert files_under(folder) <= names
    alone = {"Makefile", "mkdocs.yml", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"}
    assert alone | {"requirements.in", "requirements.lock", "requirements-alone.lock"} <= names


@pytest.fixture(scope="module")
def with_tensorflow(built, tmp_path_factory):
    """As `pip install syncbn[tensorflow]` leaves it."""
    folder = tmp_path_factory.mktemp("with-tensorflow")
    requirement = f"{built[1]}[tensorflow]"
    yield new_environment(folder / "env", requirement, "--constraint", constraints(folder))
    shutil.rmtree(folder)  # two gigabytes, which pytest would keep for three runs


def block_after(heading):
    """The first Python block of the README after this text."""
    return re.findall(r"^```python\n(.*?)^```$", README.split(heading)[1], re.M | re.S)[0]


def test_the_three_lines_of_the_readme_synchronize_a_model_in_an_empty_environment(
    with_tensorflow, tmp_path
):
    program = block_after("\n## Use\n")
    lines = [line for line in program.splitlines() if re.search(r"#\s[123]\b", line)]
    assert len(lines) == 3
    assert all("syncbn" in line for line in lines)
    seen = (
        "\nimport json, sys, syncbn as module\n"
        "kinds = [type(layer).__module__ for layer in model._flatten_layers()]\n"
        "print(json.dumps([strategy.num_replicas_in_sync, kinds, module.__file__, sys.prefix]))\n"
    )
    printed = run(with_tensorflow, "-c", program + seen, folder=tmp_path)
    replicas, kinds, file, prefix = json.loads(printed.splitlines()[-1])
    assert replicas == 2
    assert "syncbn.layer" in kinds
    assert not any("batch_normalization" in kind for kind in kinds)
    assert Path(file).is_relative_to(prefix)


def test_the_first_program_of_the_readme_prints_what_it_says_in_an_empty_environment(
    with_tensorflow, tmp_path
):
    program = block_after("# syncbn\n")
    expected = re.findall(r"^```text\n(.*?)^```$", README, re.M | re.S)[0]
    assert run(with_tensorflow, "-c", program, folder=tmp_path) == expected


def test_the_command_finds_what_is_installed(with_tensorflow, tmp_path):
    command = with_tensorflow.with_name("syncbn")
    assert "verify" in run(command, "--help", folder=tmp_path)
    assert run(command, "doctor", folder=tmp_path).startswith("Yes:")


def test_the_archive_installs_without_a_framework_and_says_what_is_missing(built, tmp_path):
    """By the builder that pip fetches: what `build-system` asks for is enough."""
    python = new_environment(tmp_path / "env", built[0], "--constraint", constraints(tmp_path))
    command = python.with_name("syncbn")
    assert "doctor" in run(command, "--help", folder=tmp_path)
    run(python, "-c", "import syncbn; print(syncbn.__version__)", folder=tmp_path)
    first = run(command, "doctor", folder=tmp_path, expected=2).splitlines()[0]
    assert first == "Cannot tell: TensorFlow is not installed."
    program = "import syncbn; syncbn.SyncBatchNormalization"
    error = subprocess.run(
        [python, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert error.returncode == 1
    assert "tensorflow" in error.stderr.splitlines()[-1].lower()
