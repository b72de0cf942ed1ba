"""The house: what importing costs, who may import whom, sizes, the public surface."""

import ast
import json
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from tests.processes import python

import syncbn

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "syncbn"
MODULES = sorted(SOURCE.rglob("*.py"))
FRAMEWORKS = {"keras", "tensorflow", "jax", "torch", "tf_keras"}


LOADED = "import sys, json; print(json.dumps(sorted(m.split('.')[0] for m in sys.modules)))"


@pytest.mark.parametrize(
    "code",
    [
        "import syncbn",
        "import syncbn.errors, syncbn.moments",
        "import syncbn\nwith __import__('contextlib').suppress(SystemExit): "
        "__import__('syncbn.cli').cli.main(['--help'])",
        *(
            "import syncbn\nwith __import__('contextlib').suppress(SystemExit): "
            f"__import__('syncbn.cli').cli.main([{command!r}, '--help'])"
            for command in ("train", "launch", "bench", "convert", "doctor", "verify")
        ),
        "import syncbn.launch.supervisor",
        "import syncbn.doctor.text, syncbn\n"
        "__import__('syncbn.cli').cli.main(['doctor', '--tensorflow', '2.9'])",
    ],
)
def test_importing_syncbn_and_asking_for_help_imports_no_framework(code):
    loaded = set(json.loads(python(f"{code}\n{LOADED}").splitlines()[-1]))
    assert "syncbn" in loaded
    assert not loaded & (FRAMEWORKS | {"numpy", "sklearn", "matplotlib", "rich"})


def test_the_test_of_light_imports_sees_a_heavy_one():
    assert "numpy" in json.loads(python(f"import numpy\n{LOADED}").splitlines()[-1])


def test_a_public_name_imports_its_module_and_no_other_name_exists():
    for name in syncbn.__all__:
        assert getattr(syncbn, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = syncbn.nonsense
    assert list(syncbn.__all__) == sorted(syncbn.__all__)
    assert set(syncbn.__all__) <= set(dir(syncbn))


def test_version_is_one_fact():
    assert metadata.version("syncbn") == syncbn.__version__
    assert f"## {syncbn.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def imports_of(path):
    """Every module that a file imports, also inside functions, except for type checkers only."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


# Left may be imported by right, never the other way: DESIGN's chain as far as it is built.
LAYERS = [
    *("errors", "files", "moments", "groups", "renorm", "places", "_backends", "_keras", "ragged"),
    *("averaging", "arguments", "weighting", "moving", "own_arguments", "layer", "tf_keras"),
    *("compat", "conversion", "portable", "checkpoints", "folding", "recalibration"),
    *("monitoring", "verification", "training", "integrations", "bench", "cli"),
]


def room(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else None


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_module_imports_to_its_right(path):
    own = room("syncbn." + ".".join(path.relative_to(SOURCE).with_suffix("").parts))
    for imported in imports_of(path):
        target = room(imported) if imported.startswith("syncbn.") else None
        if own and target:
            assert LAYERS.index(target) <= LAYERS.index(own), f"{own} imports {imported}"


ALLOWED = {
    # The command asks whether TensorFlow is there, to say what to install.
    "cli/start.py": {"tensorflow"},
    # The layer of tf_keras has its base class from there, which is TensorFlow's alone.
    "tf_keras.py": {"tensorflow", "tf_keras"},
    # These files are read by their own framework, whatever Keras runs on.
    "checkpoints/graph.py": {"tensorflow"},
    "checkpoints/torch_state.py": {"torch"},
    # Programs that the doctor runs in processes of their own.
    "doctor/probes/on_tensorflow.py": {"tensorflow"},
    "doctor/probes/on_jax.py": {"jax"},
    "doctor/probes/on_torch.py": {"torch"},
    # Whether Ray has joined the processes already.
    "integrations/ray.py": {"jax"},
}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_frameworks_are_imported_in_the_backends_alone(path):
    # The repairs are of Keras's trainer for TensorFlow, and of nothing else.
    # The selftest and the benchmarks are programs; their functions import what they need.
    if {"_backends", "multi_worker", "selftest", "bench"} & {*path.parts}:
        return
    found = {name.split(".")[0] for name in imports_of(path)} & (FRAMEWORKS - {"keras"})
    assert found <= ALLOWED.get(str(path.relative_to(SOURCE)), set())


BACKENDS = ("jax", "tensorflow", "torch")


@pytest.mark.parametrize("own", BACKENDS)
def test_no_backend_names_another(own):
    paths = sorted((SOURCE / "_backends" / own).glob("*.py"))
    assert len(paths) > 3
    others = {*BACKENDS} - {own}
    for path in paths:
        for imported in imports_of(path):
            parts = imported.split(".")
            assert parts[0] not in others, f"{path.name} imports {imported}"
            if parts[:2] == ["syncbn", "_backends"]:
                assert parts[2] not in others, f"{path.name} imports {imported}"


@pytest.mark.parametrize("own", BACKENDS)
def test_training_loads_the_framework_that_keras_runs_on_and_no_other(own):
    """Keras itself imports JAX where there is one, whatever it runs on."""
    code = f"""
import keras
{LOADED}
import syncbn
syncbn.SyncBatchNormalization()(keras.ops.ones((4, 3)), training=True)
{LOADED}"""
    before, after = (
        {*json.loads(line)} & {*BACKENDS}
        for line in python(code, KERAS_BACKEND=own).splitlines()
        if line.startswith("[")
    )
    assert own in after
    assert after == before


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_the_repair_of_keras_hangs_off_keras_alone(path):
    """It knows no layer of ours, and nothing of ours needs it: either can go upstream or away."""
    inside = "multi_worker" in path.parts
    for imported in imports_of(path):
        if inside and imported.startswith("syncbn"):
            assert imported.startswith(("syncbn.errors", "syncbn.multi_worker")), imported
        # The selftest shows that it works, on the user's cluster.
        elif not inside and path != SOURCE / "__init__.py" and "selftest" not in path.parts:
            assert not imported.startswith("syncbn.multi_worker"), imported


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_the_launcher_stands_on_the_standard_library_alone(path):
    if "launch" not in path.relative_to(SOURCE).parts[:-1]:
        return
    for imported in imports_of(path):
        ours = imported.startswith(("syncbn.errors", "syncbn.launch"))
        assert ours or imported.split(".")[0] in sys.stdlib_module_names, imported


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_the_doctor_stands_on_the_standard_library_alone(path):
    """It has to run where anything else is broken; its probes are run by other processes."""
    folders = path.relative_to(SOURCE).parts[:-1]
    if "doctor" not in folders or "probes" in folders:
        return
    for imported in imports_of(path):
        ours = imported.startswith(("syncbn.errors", "syncbn.doctor"))
        ours = ours and not imported.startswith("syncbn.doctor.probes")
        assert ours or imported.split(".")[0] in sys.stdlib_module_names, imported


PYTHON_FILES = [
    path
    for folder in ("src", "tests", "benchmarks", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_readable(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"


def test_the_lock_pins_every_package_exactly():
    lines = [
        line.strip()
        for name in ("requirements.lock", "requirements-alone.lock")
        for line in (ROOT / name).read_text().splitlines()
        if line.strip() and not line.strip().startswith("#")
    ]
    assert len(lines) > 30
    assert all("==" in line for line in lines), [line for line in lines if "==" not in line]


def test_supported_versions_are_those_of_the_readme():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    readme = (ROOT / "README.md").read_text()
    assert "keras>=" in "".join(project["dependencies"])
    for extra in project["optional-dependencies"]:
        assert f"{extra}" in readme


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_module_of_the_package_can_be_imported(backend):
    """In a process of each backend: torch loaded behind TensorFlow can end the process."""
    others = {*BACKENDS} - {backend}
    names = [
        ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
        for path in MODULES
        if path.name != "__main__.py" and not others & {*path.relative_to(SOURCE).parts}
    ]
    only_its_own = [name for name in names if f"_backends.{backend}" in name]
    names = names if backend == "tensorflow" else only_its_own
    assert len(names) > 5
    code = f"""
import importlib, json
silent = [name for name in {names} if not importlib.import_module(name).__doc__]
print(json.dumps(silent))"""
    silent = json.loads(python(code, KERAS_BACKEND=backend).splitlines()[-1])
    assert silent == [], f"{silent} say nothing of themselves"
