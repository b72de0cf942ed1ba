"""docs/how-to/doctor.md: its tables are the doctor's own."""

import re

from tests import doctor_page

from syncbn.cli import main

TEXT = doctor_page.PAGE.read_text(encoding="utf-8")


def test_the_tables_of_the_page_are_those_of_the_data():
    """`python tests/doctor_page.py` writes them anew."""
    assert doctor_page.page(TEXT) == TEXT
    # Another number in a table is not what the page is to say.
    assert TEXT.count("#20585") == 1
    assert doctor_page.page(TEXT.replace("#20585", "#1")) == TEXT


def test_every_command_of_the_page_can_be_given(capsys):
    commands = re.findall(r"^\$ syncbn (doctor .*?)(?:  #.*)?$", TEXT, flags=re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        words = command.split()
        if "--tensorflow" in words:
            assert main(words) == 0
            assert capsys.readouterr().out.startswith("Yes: ")
