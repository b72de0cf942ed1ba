"""The README is true: its code runs and prints what it says, its files and names exist."""

import re
from pathlib import Path

import pytest
from tests.processes import python

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
PYTHON_BLOCKS = [code for language, code in BLOCKS if language == "python"]


def run(code, folder):
    return python(f"import os; os.chdir({str(folder)!r})\n{code}", KERAS_BACKEND="tensorflow")


@pytest.mark.parametrize("number", range(len(PYTHON_BLOCKS)))
def test_every_python_block_runs(number, tmp_path):
    printed = run(PYTHON_BLOCKS[number], tmp_path)
    following = BLOCKS[BLOCKS.index(("python", PYTHON_BLOCKS[number])) + 1]
    if following[0] == "text":
        assert printed == following[1]


def test_the_first_ten_lines_say_what_it_is_and_show_the_two_commands():
    top = "\n".join(README.splitlines()[:10])
    for text in (
        "Synchronized batch normalization for Keras 3",
        "For people",
        "make demo",
        "make test",
    ):
        assert text in top


def test_links_to_files_exist():
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    for document in documents:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (ROOT / target).exists(), f"{document.name} links to {target}"


def test_make_targets_of_the_documents_exist():
    makefile = (ROOT / "Makefile").read_text()
    documents = README + (ROOT / "CONTRIBUTING.md").read_text()
    targets = set(re.findall(r"^\$ make ([\w-]+)", documents, flags=re.MULTILINE))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("command", ["train", "launch", "selftest", "bench", "convert"])
def test_options_of_the_documents_exist(command, capsys):
    from syncbn.cli import main

    with pytest.raises(SystemExit):
        main([command, "--help"])
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    documents = README + "".join(page.read_text() for page in (ROOT / "docs").glob("**/*.md"))
    lines = re.findall(rf"^\$ syncbn {command} (.*)", documents, re.MULTILINE)
    # What stands after a program is the program's own.
    used = {
        option
        for line in lines
        for option in re.findall(r"--[\w-]+", re.split(r" -m |\.py", line)[0])
    }
    assert used
    assert used <= known
