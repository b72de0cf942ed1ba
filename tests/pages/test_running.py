"""What runs the pages sees what is wrong with one: each kind of fault, in a page of its own."""

import textwrap

import pytest

from tests.pages.blocks import PageError, blocks_of
from tests.pages.comparing import matches
from tests.pages.running import Page
from tests.pages.session import BlockError

FAR = "<!-- block: not run: far -->\n"


def page(text):
    return textwrap.dedent(text).lstrip()


def run(text, folder, *, engines=False):
    Page(page(text), folder, engines=engines).run()


def test_blocks_share_names_files_and_order(tmp_path):
    run(
        """
        ```python
        a = 2
        ```

        ```python title="double.py"
        import sys
        print(2 * int(sys.argv[1]))
        ```

        ```console
        $ python double.py 4   # a comment
        8
        $ echo one; \\
        > echo two
        one
        ...
        ```

        ```python
        print(a + 1, open("double.py").read()[:6])
        ```

        ```text
        3 import
        ```
        """,
        tmp_path,
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```python\nprint(1)\n```\n\n```text\n2\n```\n", "prints something else"),
        ("```python\nprint(1)\n```\n\n```text\n...\n```\n", "say more"),
        ("```python\n1 / 0\n```\n", "ZeroDivisionError"),
        ("```python\nimport os; os._exit(0)\n```\n", "ended its process"),
        ("```python\nraise SystemExit('no')\n```\n", "SystemExit: no"),
        ("```console\n$ true\n$ false\n```\n", "ended with 1, not 0"),
        ("<!-- block: exit=1 -->\n```console\n$ true\n```\n", "ended with 0, not 1"),
        ("```console\n$ echo a\nb\n```\n", "prints something else"),
        ("```console\n$ syncbn doctor --no-such-option\n```\n", "no-such-option"),
        (
            FAR + "```console\n$ syncbn launch --wrong 2 a.py\n```\n",
            "wrong",
        ),
        (FAR + "```console\n$ srun syncbn lunch a.py\n```\n", "lunch"),
        (FAR + "```console\n$ pip install 'syncbn[jux]'\n```\n", "jux"),
        (FAR + "```console\n$ make tset\n```\n", "tset"),
        (FAR + "```console\n$ if\n```\n", "syntax error"),
        (
            FAR + "```python\nimport syncbn\nsyncbn.nothing()\n```\n",
            "nothing",
        ),
        (
            FAR + "```python\nfrom syncbn import enable_multi_worker\n"
            "enable_multi_worker(timout=1)\n```\n",
            "timout",
        ),
        (FAR + "```python\nfrom syncbn import nothing\n```\n", "nothing"),
        (FAR + "```python\nif\n```\n", "invalid syntax"),
        ("<!-- block: engines -->\n```python\nif\n```\n", "invalid syntax"),
        ('```bash title="job.sh"\nsrun syncbn launch --wrong 2 a.py\n```\n', "wrong"),
        (FAR + "```console\n$ syncbn doctor && syncbn launch --wrong 2 a\n```\n", "wrong"),
        ("```yaml\na: [\n```\n", "expected"),
        ("```json\n{\n```\n", "property name"),
        ("```dockerfile\nFORM python\n```\n", "FORM"),
        ("```python\n1\n```\n\n<!-- block: stderr -->\n```text\nsaid\n```\n", "not what was said"),
    ],
)
def test_what_is_not_true_is_seen(text, said, tmp_path):
    with pytest.raises(BlockError, match=said):
        run(text, tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```python\n", "nothing closes"),
        ("```py\n```\n", "LANGUAGE"),
        ("```\n```\n", "LANGUAGE"),
        ("```python workers\n```\n", "LANGUAGE"),
        ("<!-- block: wrokers=2 -->\n```python\n```\n", "no option 'wrokers'"),
        ("<!-- block: alone -->\n\n```python\n```\n", "right above a block"),
        ("<!-- block: not run -->\n```python\n```\n", "needs a value"),
        ("<!-- block: alone=1 -->\n```python\n```\n", "takes no value"),
        ('```python title="a.py"\n```\n', "no console block runs it"),
        (
            FAR + '```python title="a.py"\n```\n\n' + FAR + "```console\n$ python a.py\n```\n",
            "runs it",
        ),
        (FAR + "```python\nprint(1)\n```\n\n```text\n1\n```\n", "is not run prints nothing"),
        ("```bash\nls\n```\n", "a bash block has a title"),
    ],
)
def test_what_is_not_written_by_the_convention_is_seen(text, said, tmp_path):
    with pytest.raises(PageError, match=said):
        run(text, tmp_path)


def test_slow_blocks_run_when_asked_for(tmp_path):
    text = "<!-- block: engines -->\n```python\n1 / 0\n```\n"
    run(text, tmp_path)
    with pytest.raises(BlockError, match="ZeroDivisionError"):
        run(text, tmp_path, engines=True)


def test_a_program_on_workers_is_run_on_each(tmp_path):
    text = (
        "<!-- block: torch; workers=2 -->\n```python\nimport os\nprint(os.environ['RANK'])\n```\n\n"
        "```text\n[0] 0\n[1] {}\n```\n"
    )
    run(text.format(1), tmp_path)
    with pytest.raises(BlockError, match="no worker printed"):
        run(text.format(2), tmp_path)


def test_an_ellipsis_stands_for_a_part_of_a_line_or_for_lines():
    assert matches("a 12 b\nc\nd\n", "a ... b\n...\n")
    assert matches("a\nd\n", "a\n...\nd\n")
    assert not matches("a 12 b\nc\n", "a ... b\n")
    assert not matches("x\na\n", "a\n")


def test_blocks_in_lists_are_blocks():
    (block,) = blocks_of("1. Do:\n\n    ```python\n    if 1:\n        a = 1\n    ```\n")
    assert block.text == "if 1:\n    a = 1\n"
