"""The site that `make docs` builds: whole, by itself, and refused where a link goes nowhere."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def build(folder, *options):
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder, *options],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


class Links(HTMLParser):
    """What a page refers to, what it loads, and what may be referred to in it."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loaded, self.names = set(), set(), set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.names |= {values[key] for key in ("id", "name") if values.get(key)}
        if tag == "a" and values.get("href"):
            self.links.add(values["href"])
        if tag in {"script", "img", "iframe", "source"} and values.get("src"):
            self.loaded.add(values["src"])
        if tag == "link" and values.get("rel") in {"stylesheet", "icon", "preload", "preconnect"}:
            self.loaded.add(values["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    result = build(folder)
    assert result.returncode == 0, result.stderr
    return {path: Links(path) for path in folder.rglob("*.html") if path.name != "404.html"}


def broken(site, path):
    """The references of a page that lead to no file or to no place in one."""
    for target in site[path].links | site[path].loaded:
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        file, anchor = map(unquote, urldefrag(target))
        other = (path.parent / file).resolve() if file else path
        if not other.exists() or (anchor and other in site and anchor not in site[other].names):
            yield target


def test_every_reference_within_the_site_leads_somewhere(site):
    assert len(site) > 20
    assert not {str(path): found for path in site if (found := [*broken(site, path)])}


def test_no_page_loads_anything_from_elsewhere(site):
    for page in site.values():
        assert page.loaded
        assert not [one for one in page.loaded if one.startswith(("http:", "https:", "//"))]


def test_the_page_of_commands_has_the_help_of_each(site):
    from syncbn.cli import parser

    (page,) = [path for path in site if path.name == "command-line.html"]
    text = page.read_text(encoding="utf-8")
    commands = parser().format_usage() + parser().format_help()
    for name in ("train", "launch", "selftest", "bench", "convert", "doctor", "verify"):
        assert name in commands
        assert f"usage: syncbn {name}" in text


def test_a_link_to_nowhere_and_a_page_in_no_menu_end_the_build(tmp_path):
    """With the settings of the site, and pages of this test."""
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    kept = {key: settings[key] for key in ("strict", "validation", "site_name")}
    docs = tmp_path / "docs"
    docs.mkdir()
    config = tmp_path / "mkdocs.yml"
    config.write_text(yaml.safe_dump({**kept, "nav": ["index.md"]}))
    (docs / "index.md").write_text("# Start\n")
    assert build(tmp_path / "site", "--config-file", config).returncode == 0
    faults = [
        "[a](b.md)",
        "[a](#nowhere)",
        "[a](../../src/layer.py)",
        "![a](none.png)",
        "[a](/c.md)",
    ]
    (docs / "index.md").write_text("# Start\n\n" + "\n".join(faults))
    (docs / "left-out.md").write_text("# In no menu\n")
    result = build(tmp_path / "site", "--config-file", config)
    assert result.returncode == 1
    assert result.stderr.count("WARNING") == len(faults) + 1


def test_the_command_of_the_house_ends_at_a_warning():
    """MkDocs counts no warnings with --quiet, and builds on."""
    (recipe,) = re.findall(r"^docs: .*\n\t(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert "mkdocs build --strict" in recipe
    assert "-q" not in recipe
