"""Every public name says what it is, takes, gives and raises, of what shapes, and after whom.

The pages of the API are made of these docstrings: what is not in one is nowhere.
"""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import syncbn

API = Path(__file__).parents[2] / "docs" / "reference" / "api"
PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted(API.glob("*.md"))}
# On a page, by its `:::`; the module of each that is not in `syncbn` itself.
SHOWN = [name for text in PAGES.values() for name in re.findall(r"^::: ([\w.]+)$", text, re.M)]
ERRORS = {name for name in syncbn.__all__ if name.endswith("Error")}
PUBLIC = [name for name in syncbn.__all__ if name not in ERRORS]
PUBLIC += ["compat.install", "integrations.ray.prepare", "integrations.ray.ReportCheckpoint"]
# They take or give arrays, or say numbers of some.
OF_ARRAYS = {
    *("SyncBatchNormalization", "SyncMonitor", "average_moving_statistics", "distribute_dataset"),
    *("recalibrate", "verify"),
}
# What a plan or a verdict raises when it is only data.
ONLY_DATA = {"ConversionPlan", "Verdict"}


def section(text, name):
    """The lines of a section of a Google docstring, or None."""
    found = re.search(rf"^{name}:\n((?:    .*\n|\n)*)", text + "\n", re.MULTILINE)
    return found and found[1]


def named(text, name):
    """The names that a section of a docstring has at its outer margin."""
    return {*re.findall(r"^    \*{0,2}(\w+):", section(text, name) or "", re.MULTILINE)}


def thing(name):
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(f"syncbn.{module}" if module else "syncbn"), last)


def documented(name):
    return inspect.getdoc(thing(name))


def parameters_of(function):
    parameters = inspect.signature(function).parameters.values()
    return {one.name for one in parameters if one.name != "kwargs"}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_starts_with_one_line(name):
    first, *rest = documented(name).splitlines()
    assert first.endswith((".", "?"))
    assert not rest or rest[0] == ""


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_explains_every_parameter_and_no_other(name):
    if name in ONLY_DATA:
        fields = parameters_of(thing(name))
        assert named(documented(name), "Attributes") == fields
    else:
        extra = {"kwargs"} & named(documented(name), "Args")
        assert named(documented(name), "Args") == parameters_of(thing(name)) | extra


@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in ONLY_DATA])
def test_a_public_name_says_what_it_raises_and_its_source(name):
    text = documented(name)
    for error in named(text, "Raises"):
        kind = getattr(syncbn, error, None) or getattr(importlib.import_module("builtins"), error)
        assert issubclass(kind, Exception)
    assert named(text, "Raises")
    assert (section(text, "References") or "").strip()


@pytest.mark.parametrize("name", [name for name in PUBLIC if name.rpartition(".")[2][0].islower()])
def test_a_public_function_says_what_it_gives(name):
    gives = inspect.signature(thing(name)).return_annotation
    text = documented(name)
    assert bool(section(text, "Returns") or section(text, "Yields")) == (gives != "None")


@pytest.mark.parametrize("name", sorted(OF_ARRAYS))
def test_what_takes_arrays_says_their_shapes(name):
    assert re.search(r"\bshapes?\b|\brows?\b|\[R\]|channels", documented(name), re.IGNORECASE)


def methods_of_our_own():
    """Public methods of public classes that override nothing of Keras's or Python's."""
    for name in PUBLIC:
        kind = thing(name)
        if not inspect.isclass(kind):
            continue
        for method, function in vars(kind).items():
            theirs = any(
                hasattr(base, method) and not base.__module__.startswith("syncbn")
                for base in kind.__mro__[1:]
            )
            if not method.startswith("_") and not theirs and inspect.isfunction(function):
                yield pytest.param(function, id=f"{name}.{method}")


@pytest.mark.parametrize("method", [*methods_of_our_own()])
def test_a_method_explains_itself_and_its_parameters(method):
    text = inspect.getdoc(method)
    assert text.splitlines()[0].endswith(".")
    assert named(text, "Args") == parameters_of(method) - {"self"}


def test_every_public_name_is_on_exactly_one_page_of_the_api():
    names = [name.removeprefix("syncbn.") for name in SHOWN]
    assert len(names) == len(set(names))
    assert {*syncbn.__all__, "tf_keras", "compat"} <= {*names}
    assert {name for name in PUBLIC if name.startswith("integrations.")} <= {*names}


def test_every_name_of_the_api_pages_exists():
    for name in SHOWN:
        module, _, last = name.rpartition(".")
        if last != "tf_keras":
            found = importlib.import_module(module)
            assert hasattr(found, last) or importlib.import_module(name)


def test_the_audit_sees_what_is_missing():
    def undocumented(x):
        """Says nothing of x."""

    text = inspect.getdoc(undocumented)
    assert named(text, "Args") != parameters_of(undocumented)
    assert section(text, "References") is None
