"""The page of `lgl who` in a real browser: it plays, and it fits."""

import time

import numpy as np
import pytest
import soundfile
from browser import Browser, find_chromium

from lgl_plugin.inference.speakers import Speakers
from lgl_plugin.report.speakers import write_page

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium on this machine"
)
LOAD = """window.played = 0; for (const audio of document.querySelectorAll(
    'audio')) { audio.oncanplay = () => { window.played += 1 };
    audio.onerror = () => { window.played = -99 }; audio.load() }"""


@pytest.mark.parametrize("width", [1280, 390])
def test_every_file_plays(tmp_path, width):
    names = ["a b/50%.wav", "ü#?.flac", "d:e.ogg"]
    for name in names:
        path = tmp_path / "audio" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.sin(np.arange(16000) / 20) / 2, 16000)
    labels, confidence = np.array([0, 0, 1]), np.float32([0.9, -0.1, 0.5])
    speech = Speakers(names, np.ones(3), labels, confidence, "hand")
    page = write_page(tmp_path / "out" / "who.html", speech, tmp_path / "audio")
    browser = Browser(tmp_path / "profile")
    try:
        browser.open(page.as_uri(), width)
        assert browser.complaints() == []
        scrollable = browser.evaluate("document.documentElement.scrollWidth")
        assert scrollable <= width
        browser.evaluate(LOAD)
        end = time.monotonic() + 30
        while browser.evaluate("window.played") not in (3, -99):
            assert time.monotonic() < end
            time.sleep(0.2)
        assert browser.evaluate("window.played") == 3
    finally:
        browser.close()
