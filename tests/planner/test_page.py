"""The HTML page: whole in itself, and laid out by a real browser."""

from __future__ import annotations

import html.parser
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace

import pytest

from kvcore.planner import get_model, page, plan, report

PROBE = """<script>
const wide = [...document.querySelectorAll('body *')].filter(
  e => !e.closest('.wide, svg') && e.getBoundingClientRect().right > window.innerWidth + 1);
document.title = JSON.stringify({
  width: window.innerWidth, content: document.documentElement.scrollWidth,
  wide: wide.map(e => e.tagName), tables: document.querySelectorAll('table').length,
  rows: document.querySelectorAll('tbody tr').length,
  pictures: [...document.querySelectorAll('figure svg')].map(
    e => Math.round(e.getBoundingClientRect().height)),
  small: Math.min(...[...document.querySelectorAll('td, p')].map(
    e => parseFloat(getComputedStyle(e).fontSize)))});
</script>"""


@pytest.fixture(scope="module")
def found():
    return plan("gpt-oss-20b", "h100", 8, 32768, "rot8", num_devices=2)


@pytest.fixture(scope="module")
def text(found):
    return page.render(found)


class Tags(html.parser.HTMLParser):
    """Open tags, and everything that could load from elsewhere."""

    EMPTY = frozenset({"meta", "link", "img", "br", "input"})

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.cells = [], [], 0

    def handle_starttag(self, tag, attributes):
        self.cells += tag == "td"
        self.loads += [v for k, v in attributes if k in ("src", "href", "xlink:href", "data")]
        if tag in ("script", "link", "iframe", "img"):
            self.loads.append(tag)
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.loads += [v for k, v in attributes if k in ("src", "href", "xlink:href", "data")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_is_whole_and_loads_nothing(found, text):
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert [load for load in tags.loads if not load.startswith("#")] == []
    assert not re.search(r"url\((?!#)|@import", text)
    assert tags.cells == sum(len(s.rows) * len(s.columns) for s in report.sections(found))


def test_says_what_the_tables_say(found, text):
    for section in report.sections(found):
        for row in report.shown_rows(section):
            assert all(cell.replace("&", "&amp;") in text for cell in row)
    assert ">fits<" in text


def test_names_are_escaped():
    text = page.render(plan(replace(get_model("gpt2"), name="<b>&"), "h100", context=64))
    assert "<b>" not in text.replace("<body>", "")
    assert "&lt;b&gt;&amp; on h100" in text


def browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless-shell")
    found = os.environ.get("KVCORE_BROWSER") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no Chromium here: apt-get install chromium, or KVCORE_BROWSER names one")
    return found


@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_lays_it_out(width, text, tmp_path):
    """On a phone and on a desk: nothing but the tables' own frames is wider than the window."""
    file = tmp_path / "page.html"
    file.write_text(text.replace("</body>", PROBE + "</body>"))
    # A window is at least 500 wide; a frame within it may be as narrow as a phone.
    frame = tmp_path / "frame.html"
    frame.write_text(
        f"<!doctype html><title>waiting</title><iframe src='page.html' width={width} height=800 "
        "style='border:0' onload='document.title = this.contentDocument.title'></iframe>"
    )
    result = subprocess.run(
        [
            browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1300,900", "--virtual-time-budget=5000", "--dump-dom", frame.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", result.stdout, re.DOTALL)[1]
    seen = json.loads(title)
    assert seen["width"] == width
    assert seen["content"] <= width
    assert seen["wide"] == []
    assert seen["tables"] == text.count("<table")
    assert len(seen["pictures"]) == 3 and min(seen["pictures"]) > 100
    assert seen["small"] >= 14
