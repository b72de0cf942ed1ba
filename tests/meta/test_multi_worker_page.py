"""docs/how-to/multi-worker.md is true: it lists the repairs."""

from pathlib import Path

from syncbn.multi_worker import REPAIRS

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "multi-worker.md").read_text()


def test_the_table_is_the_catalogue():
    def issue(address):
        if not address.startswith("https://"):
            return address
        _, _, _, _, repository, _, number = address.split("/")
        return f"[{repository}#{number}]({address})"

    rows = [f"| `{r.name}` | {r.mends} | {issue(r.issue)} |" for r in REPAIRS]
    table = PAGE.split("<!-- repairs -->\n")[1].split("\n<!-- /repairs -->")[0]
    assert table.splitlines()[2:] == rows
