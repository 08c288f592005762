"""A report in a real browser."""

import json

import pytest
from browser import Browser, find_chromium
from made_run import make_run

from lgl_plugin.report.build import write_report

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium on this machine"
)
# Of each figure: the image's own width, and how it is shown.
FIGURES = """[...document.images].map(image => [
    image.naturalWidth, image.clientWidth, image.clientHeight])"""
# What reaches beyond the page and cannot be scrolled to within it.
CUT = """[...document.querySelectorAll('body *')]
    .filter(part => !part.closest('.scroll, pre'))
    .filter(part => part.getBoundingClientRect().right > innerWidth + 1)
    .map(part => part.outerHTML.slice(0, 80))"""

# Tables that are cut off until they are scrolled.
SCROLLED = """[...document.querySelectorAll('.scroll')]
    .filter(part => part.scrollWidth > part.clientWidth + 1)
    .map(part => part.getAttribute('aria-label'))"""
# Words of headings that are broken, as "host" into h, os and t.
BROKEN = """[...document.querySelectorAll('th[scope=col]')].filter(cell => {
    const text = cell.firstChild;
    return [...text.data.matchAll(/[^ -]+/g)].some(word => {
        const range = document.createRange();
        range.setStart(text, word.index);
        range.setEnd(text, word.index + word[0].length);
        return range.getClientRects().length > 1;
    });
}).map(cell => cell.textContent)"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A run's page and a comparison's, and how many figures they have."""
    folder = tmp_path_factory.mktemp("runs")
    first, second = (
        make_run(folder / str(n), seed=n, rounds=1) for n in (1, 2)
    )
    for run in (first, second):
        start = {"time": "2026-01-02T03:04:05+00:00", "device": "AMD EPYC"}
        start |= {"command": "python train_lgl.py " + "--option=value " * 30}
        start |= {"host": "vm", "commit": "0a" * 20}
        start |= {"versions": {f"package{n}": n for n in "123"}}
        (run / "starts.jsonl").write_text(json.dumps(start))
    unlabelled = make_run(folder / "3", speakers=False, trials=False, rounds=1)
    return {
        "unlabelled": (write_report([unlabelled]), 10),
        "run": (write_report([first]), 12),
        "comparison": (write_report([first, second]), 2),
    }


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("kind", ["run", "unlabelled", "comparison"])
def test_page_is_shown_whole(browser, pages, kind, width):
    page, n_figures = pages[kind]
    browser.open(page.as_uri(), width)
    assert browser.complaints() == []
    figures = browser.evaluate(FIGURES)
    assert len(figures) == n_figures
    for natural, shown, height in figures:
        assert natural > 0 and 300 <= shown <= width and height > 150
    browser.evaluate(
        "document.querySelectorAll('details').forEach(part => part.open = true)"
    )
    scrollable = browser.evaluate("document.documentElement.scrollWidth")
    assert scrollable <= width
    assert browser.evaluate(CUT) == []
    assert browser.evaluate(BROKEN) == []
    if width == 1280:
        assert browser.evaluate(SCROLLED) == []
    asked = [a for a in browser.addresses() if not a.startswith("data:")]
    assert asked == [page.as_uri()]


def test_a_broken_page_would_be_noticed(browser, tmp_path):
    """Each of the checks above fails where it should."""
    page = tmp_path / "index.html"
    page.write_text(
        '<!doctype html><img src="missing.png"><div style="width: 2000px">'
        "wide</div><script>console.error('oh')</script>"
    )
    browser.open(page.as_uri(), 390)
    assert len(browser.complaints()) >= 2  # the script's and the image's
    assert browser.evaluate(FIGURES)[0][0] == 0
    assert browser.evaluate(CUT) != []
    assert len(browser.addresses()) == 2
