"""lgl who: speakers of a folder, a csv and a page that plays them."""

import collections
import csv
import html.parser
import pathlib
import urllib.parse

import numpy as np
import pytest
import soundfile
from sklearn.metrics import silhouette_samples

from lgl_plugin.cli.main import main
from lgl_plugin.clustering.vectors import normalised
from lgl_plugin.inference.speakers import Speakers, confidences
from lgl_plugin.report.speakers import PLAYERS_A_SPEAKER, write_page


def who(encoder, audio, output, *options):
    main(
        ["who", str(encoder), str(audio), str(output), "--device=cpu", *options]
    )
    with open(output / "speakers.csv", newline="", encoding="utf-8") as source:
        return list(csv.DictReader(source))


@pytest.mark.parametrize("option", [(), ("--speakers=4",)])
def test_files_of_a_speaker_come_together(encoder, audio, tmp_path, option):
    groups = collections.defaultdict(set)
    for row in who(encoder, audio, tmp_path, *option):
        groups[row["speaker"]].add(row["file"].split("/")[0])
        assert -1 <= float(row["confidence"]) <= 1
    assert sorted(map(sorted, groups.values())) == [
        ["ann"],
        ["bob"],
        ["cat"],
        ["dan"],
    ]
    assert set(groups) == {"1", "2", "3", "4"}


class Sources(html.parser.HTMLParser):
    """Collects what audio elements play, and scripts."""

    def __init__(self):
        super().__init__()
        self.played, self.scripts = [], 0

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script"
        if tag == "audio":
            self.played.append(dict(attributes)["src"])


def test_the_page_plays_every_file(encoder, audio, tmp_path):
    """By relative paths, whatever the names; it runs no script."""
    odd = tmp_path / "audio"
    wav, rate = soundfile.read(audio / "ann" / "0.wav")
    for name in ("a b.wav", "50%.wav", "<i>&.wav", "c#1?.wav", "d:e.wav"):
        (odd / "ü").mkdir(parents=True, exist_ok=True)
        soundfile.write(odd / "ü" / name, wav, rate)
    out = tmp_path / "results" / "who"
    rows = who(encoder, odd, out)
    text = (out / "index.html").read_text(encoding="utf-8")
    sources = Sources()
    sources.feed(text)
    assert sources.scripts == 0 and "<i>" not in text
    played = {
        (out / urllib.parse.unquote(address)).resolve()
        for address in sources.played
    }
    assert played == {odd / row["file"] for row in rows}
    assert all(path.is_file() for path in played)


def test_a_known_number_must_be_possible(encoder, audio, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        who(encoder, audio, tmp_path, "--speakers=17")
    assert "--speakers=17 must be from 1 to 16" in capsys.readouterr().err


def test_confidence_is_the_silhouette():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [20, 10, 5])
    vectors = rng.normal(size=(3, 8))[labels] + rng.normal(size=(35, 8))
    expected = silhouette_samples(vectors, labels, metric="cosine")
    found = confidences(normalised(vectors), labels)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_speaker_of_one_file_and_a_single_speaker():
    vectors = np.float32([[1, 0, 0], [0.8, 0.6, 0], [0, 0, 1]])
    found = confidences(vectors, np.array([0, 0, 1]), threshold=0.5)
    assert found[2] == pytest.approx(0.5)  # 1 from others, joined at 0.5
    found = confidences(vectors[:2], np.array([0, 0]), threshold=0.5)
    np.testing.assert_allclose(found, 0.8, atol=1e-6)


def test_a_large_page_shows_some_of_each_speaker(tmp_path):
    n = 100
    speech = Speakers(
        [f"{row}.wav" for row in range(n)],
        np.ones(n),
        np.arange(n) // 60,
        np.linspace(1, 0, n, dtype=np.float32),
        "hand",
    )
    page = write_page(tmp_path / "index.html", speech, tmp_path)
    text = pathlib.Path(page).read_text()
    assert text.count("<audio") == 2 * PLAYERS_A_SPEAKER
    assert "48 more between these are in speakers.csv" in text


def test_an_encoder_without_a_threshold(encoder, audio, tmp_path, capsys):
    """One is found by halves of these very files."""
    for name in ("hyperparams.yaml", "embedding_model.ckpt"):
        (tmp_path / name).write_bytes((encoder / name).read_bytes())
    yaml = tmp_path / "hyperparams.yaml"
    yaml.write_text(yaml.read_text().replace("threshold: 0.9\n", ""))
    rows = who(tmp_path, audio, tmp_path / "out")
    assert "found by halves of these files" in capsys.readouterr().out
    assert len(rows) == 16
