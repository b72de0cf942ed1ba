"""The page of a verification, opened in a real browser without a window.

Debian: apt-get install chromium-headless-shell. Where there is none the tests are skipped, but fail
where the environment has CI, so that nobody takes them for passed.
"""

import http.server
import os
import re
import shutil
import threading

import pytest
from tests import verdicts

from syncbn.verification import page as pages
from syncbn.verification import rows

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
ALL = {
    "agrees": verdicts.agreeing(),
    "departs": verdicts.departing(nan_from=6),
    "one": verdicts.departing(1, at=0, steps=1),
    "deep": verdicts.departing(200, at=80, steps=3),
    "nothing": verdicts.telling_nothing(),
    "strange": verdicts.strange(),
    "unbroken": verdicts.departing(3, at=1, names=["x" * 300, "y" * 300, "z" * 300], steps=1),
}
every_page = pytest.mark.parametrize("name", ALL)


def missing(what):
    said = f"the page is checked in a browser, and there is no {what}"
    if os.environ.get("CI"):
        pytest.fail(f"{said} (Debian: apt-get install chromium-headless-shell)")
    pytest.skip(said)


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("package playwright")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        missing(f"browser: {', '.join(BROWSERS)}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name, verdict in ALL.items():
        pages.write_page(verdict, folder / f"{name}.html")
    return folder


@pytest.fixture
def opened(browser, folder):
    """Opens a page by its name; says in the end if it asked for something or complained."""
    contexts, requests, complaints = [], [], []

    def open_page(name, width=1280, **how):
        context = browser.new_context(viewport={"width": width, "height": 900}, **how)
        contexts.append(context)
        tab = context.new_page()
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.goto((folder / f"{name}.html").as_uri())
        assert requests.pop(0) == (folder / f"{name}.html").as_uri()
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert requests == []
    assert complaints == []


@every_page
def test_the_page_shows_the_outcome_all_layers_and_the_picture(name, opened):
    verdict, tab = ALL[name], opened(name)
    assert verdict.outcome.word in tab.inner_text("h1").lower()
    assert tab.is_visible("h1")
    assert verdict.outcome.word in tab.title()
    assert tab.get_attribute("html", "lang") == "en"
    assert tab.locator("#layers tbody tr").count() == len(verdict.layers)
    assert tab.locator(".findings li").count() == len(verdict.findings)
    cells = {
        (one.kind, one.layer, one.step)
        for one in verdict.comparisons
        if one.kind in rows.LAYER_KINDS
    }
    assert tab.locator("figure .cell").count() == len(cells)
    if not verdict.layers:
        assert tab.locator("figure").count() == 0
        return
    box = tab.locator("figure .scroll svg").bounding_box()
    assert box["width"] > 300
    assert box["height"] > 100
    for at in (0, -1):
        cell = tab.locator("figure .cell path").nth(at).bounding_box()
        assert cell["width"] > 2
        assert cell["height"] > 2
    first = tab.locator("#layers tr.first")
    assert first.count() == (not verdict.agrees)
    if not verdict.agrees:
        assert rows.printable(verdict.first_departure.layer) in first.inner_text()


def test_headings_and_pictures_have_words_for_those_who_do_not_see_them(opened):
    tab = opened("departs")
    label = tab.get_attribute("figure .scroll svg", "aria-label")
    assert "The first is number 5, stage1_block2_bn." in label
    assert tab.get_attribute("figure .scroll svg", "role") == "img"
    assert tab.locator("table").count() == tab.locator("table:has(thead th[scope=col])").count() > 2
    assert tab.locator("#layers tbody tr:has(th[scope=row])").count() == 8
    assert tab.locator("main h1").count() == 1


def test_names_do_nothing_but_stand_there(opened):
    tab = opened("strange")
    assert tab.evaluate("window.harm") is None
    assert tab.locator("img").count() == 0
    assert tab.locator("b").count() == 0
    assert tab.locator("script").count() == 1
    shown = tab.locator("#layers").inner_text()
    titles = tab.locator("figure .cell title").all_text_contents()
    for name in verdicts.STRANGE_NAMES:
        printable = " ".join(rows.printable(name).split())
        assert printable in " ".join(shown.split())
        assert any(printable in " ".join(title.split()) for title in titles)


@pytest.fixture
def server():
    """Counts what reaches it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(204)
            self.send_header("Access-Control-Allow-Origin", "*")
            self.end_headers()

        def log_message(self, *arguments):
            pass

    asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


INJECT = """async (address) => {
  const refused = [];
  document.addEventListener("securitypolicyviolation", (e) => refused.push(e.effectiveDirective));
  const image = new Image();
  const answered = new Promise((done) => { image.onload = image.onerror = done; });
  image.src = address + "/image";
  const script = document.createElement("script");
  script.textContent = "window.harm = 1";
  document.body.append(image, script);
  await Promise.allSettled([answered, fetch(address + "/fetch")]);
  await new Promise((done) => setTimeout(done, 50));
  return [refused.sort(), window.harm ?? 0];
}"""


@pytest.mark.parametrize("guarded", [True, False])
def test_the_policy_refuses_whatever_would_be_asked_for(guarded, browser, folder, server):
    """And without it all of that would have been: the check can fail."""
    address, asked = server
    source = (folder / "departs.html").read_text(encoding="utf-8")
    bare = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", source)
    assert bare != source
    (folder / "tried.html").write_text(source if guarded else bare, encoding="utf-8")
    tab = browser.new_page()
    tab.goto((folder / "tried.html").as_uri())
    refused, harm = tab.evaluate(INJECT, address)
    tab.close()
    if guarded:
        assert asked == []
        assert refused == ["connect-src", "img-src", "script-src-elem"]
        assert harm == 0
    else:
        assert sorted(asked) == ["/fetch", "/image"]
        assert refused == []
        assert harm == 1


def luminance(colour):
    channels = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(share * one for share, one in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


COLOURS = """(selector) => {
  const of = (one, name) => getComputedStyle(one)[name];
  let back = document.querySelector(selector);
  const text = of(back, back.namespaceURI.endsWith("svg") ? "fill" : "color");
  while (of(back, "backgroundColor") === "rgba(0, 0, 0, 0)") back = back.parentElement;
  return [text, of(back, "backgroundColor")];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["agrees", "departs", "nothing"])
def test_text_stands_out_in_light_and_dark(scheme, name, opened):
    """By 4.5 to 1, as the guidelines for accessible pages have it."""
    tab = opened(name, color_scheme=scheme)
    for selector in (
        "h1",
        "h2",
        "p.soft",
        "figure .scroll svg",
        "td.off",
        "td .soft",
        ".mark",
        "dt",
    ):
        if not tab.locator(selector).count():
            continue
        text, back = map(luminance, tab.evaluate(COLOURS, selector))
        assert (text > back) == (scheme == "dark")
        assert (max(text, back) + 0.05) / (min(text, back) + 0.05) >= 4.5, selector


@every_page
def test_a_narrow_screen_scrolls_the_picture_and_the_tables_and_not_the_text(name, opened):
    tab = opened(name, width=360)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    for paragraph in tab.locator("p, h1, h2, h3, li").all()[:12]:
        box = paragraph.bounding_box()
        assert box["x"] + box["width"] <= 360


def test_the_table_is_sorted_and_filtered_and_cells_lead_to_their_rows(opened):
    tab = opened("deep")
    verdict = ALL["deep"]
    names = "#layers tbody tr:visible th"
    tab.click("#layers th button:text-is('outputs')")
    assert tab.get_attribute("#layers th[aria-sort]", "aria-sort") == "descending"
    worst = max(
        verdict.layers, key=lambda one: verdict.worst(rows.LAYER_KINDS[0], one.path).difference
    )
    assert worst.path in tab.locator(names).first.inner_text()
    tab.click("#layers th button:text-is('no.')")
    assert verdict.layers[0].path in tab.locator(names).first.inner_text()
    departing = sum(row.departs for row in rows.rows_of(verdict))
    tab.check("#departing")
    assert tab.locator(names).count() == departing < 200
    # A layer that agrees is shown again when its cell is asked for.
    agreeing = next(row.number - 1 for row in rows.rows_of(verdict) if not row.departs)
    cell = tab.locator(f"figure .cell[data-layer='{agreeing}'] path").first
    cell.hover()
    assert tab.inner_text("#readout") == cell.locator("..").locator("title").text_content()
    cell.click()
    assert tab.locator("#layers tr.sought").get_attribute("id") == f"layer-{agreeing}"
    assert tab.locator("#layers tr.sought").is_visible()


def test_it_prints(opened):
    tab = opened("departs", color_scheme="dark")
    assert len(re.findall(rb"/Type\s*/Page\b", tab.pdf(prefer_css_page_size=True))) in range(2, 8)
    tab.emulate_media(media="print")
    text, back = map(luminance, tab.evaluate(COLOURS, "h2"))
    assert (text, back) == (0, 1)
    assert not tab.is_visible("#readout")
