"""The README is true: its files, commands and names exist; tests/pages runs its code."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


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
