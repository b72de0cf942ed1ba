"""One of Keras's backends for the whole run: virtual devices, and the mutant that is asked for.

By KERAS_BACKEND. `tests/contract` is every backend's, and the folder of its name is its own; all
the rest is TensorFlow's, which is the default. With SYNCBN_KERAS=tf_keras it is tf_keras's run.
"""

import collections
import importlib
import inspect
import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import hypothesis
import pytest

from tests.which_keras import TF_KERAS

BACKEND = os.environ["KERAS_BACKEND"]

hypothesis.settings.register_profile(
    "contract",
    deadline=None,
    derandomize=True,
    # JAX compiles each example, for a second; with tf_keras the kernels are TensorFlow's again.
    max_examples=int(
        os.environ.get("SYNCBN_EXAMPLES", "4" if BACKEND == "jax" or TF_KERAS else "15")
    ),
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("contract")


_FOLDERS = {"jax": ("contract", "jax"), "torch": ("contract", "torch")}
_OF_KERAS_3 = ("test_conversion.py",)
_OF_OTHERS = ("jax", "tf_keras", "torch")


def pytest_ignore_collect(collection_path):
    """Whether a folder of tests is not this backend's."""
    folder = collection_path.relative_to(Path(__file__).parent).parts[:1]
    if TF_KERAS and collection_path.name in _OF_KERAS_3:
        return True
    own = ("contract", "tf_keras") if TF_KERAS else _FOLDERS.get(BACKEND)
    if not folder:
        return None
    return (folder[0] in _OF_OTHERS if own is None else folder[0] not in own) or None


# What has a command of its own, which runs all of it.
_SLOW = ("benchmarks", "engines", "frameworks", "models", "scenarios", "survival")
# Of so many cases of a test one is run.
_STEP = 16 if TF_KERAS or BACKEND in _FOLDERS else 8
# TensorFlow leaves out none of a test with few.
_FEW = 4 if _STEP == 8 else 0
# Chosen by their own tables already.
_CHOSEN = ("test_scenarios.py", "test_verify.py")


def pytest_collection_modifyitems(config, items):
    """Every claim is tested on every backend in the time of `make test`, by fewer cases.

    On JAX, torch and tf_keras by every sixteenth case of each test, the first among them; on
    TensorFlow by every eighth where the contract or its own tests have many. SYNCBN_EVERY_CASE=1,
    as `make test-frameworks` has it, runs all.
    """
    if os.environ.get("SYNCBN_EVERY_CASE"):
        return
    tests = [item.nodeid.split("[")[0] for item in items]
    sizes, seen = collections.Counter(tests), collections.Counter()
    kept, left_out = [], []
    for item, test in zip(items, tests, strict=True):
        many = sizes[test] > _FEW and {"contract", BACKEND, "tf_keras"} & {*item.path.parts}
        chosen = item.path.name in _CHOSEN or any(map(item.get_closest_marker, _SLOW))
        (left_out if many and seen[test] % _STEP and not chosen else kept).append(item)
        seen[test] += 1
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session", autouse=True)
def _devices():
    from tests import mutants

    importlib.import_module(f"tests.replicas.{BACKEND}").start()
    mutants.apply(os.environ.get("SYNCBN_MUTANT", ""))


@pytest.fixture(autouse=True)
def _fresh_keras_names():
    import keras

    # Freeing memory is a whole garbage collection, a second a test once TensorFlow has graphs.
    # Before Keras 3.3 nothing is freed, and there is no such argument.
    known = inspect.signature(keras.backend.clear_session).parameters
    keras.backend.clear_session(**({"free_memory": False} if "free_memory" in known else {}))
    keras.utils.set_random_seed(0)


@pytest.fixture
def launch(tmp_path):
    """Makes launches; at the end none of their processes is left, whatever the test found."""
    from tests.multiprocess.launching import Launch

    made = []

    def make(program, *options, arguments=()):
        made.append(Launch(tmp_path, program, *options, arguments=arguments))
        return made[-1]

    yield make
    left = [one.processes() for one in made]
    for one in made:
        one.kill_all()
    assert not any(left)
