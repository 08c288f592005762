"""lgl who: speakers of a folder, a csv and a page that plays them."""

import collections
import csv
import html.parser
import json
import pathlib
import shutil
import urllib.parse

import numpy as np
import pytest
import soundfile
from sklearn.metrics import adjusted_rand_score

from lgl_plugin.cli.main import main
from lgl_plugin.clustering.clearest import silhouettes
from lgl_plugin.clustering.vectors import normalised
from lgl_plugin.dataio.manifest import Manifest
from lgl_plugin.inference import speakers
from lgl_plugin.inference.speakers import Speakers, find_speakers
from lgl_plugin.inference.store import Embeddings
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


def test_a_page_of_others_is_not_replaced(encoder, audio, tmp_path, capsys):
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        who(encoder, audio, tmp_path)
    assert "index.html, which would be replaced" in capsys.readouterr().err
    assert (tmp_path / "index.html").read_text() == "mine"


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


def test_labels_name_people_and_strangers_stay_strangers(
    encoder, audio, tmp_path, capsys
):
    """One label is wrong on purpose, and is found."""
    named = {f"{who}/{n}.wav": who for who in ("ann", "bob") for n in range(3)}
    named["cat/0.wav"] = "bob"
    path = tmp_path / "labels.csv"
    lines = [f"{name},{who}" for name, who in named.items()]
    path.write_text("\n".join(["utterance,speaker", *lines]))
    rows = who(encoder, audio, tmp_path / "out", f"--labels={path}")
    found = {row["file"]: row["speaker"] for row in rows}
    assert found["ann/3.wav"] == "ann" and found["bob/3.wav"] == "bob"
    assert found["cat/0.wav"] == "bob"  # what was given stays
    strangers = {n: s for n, s in found.items() if s.startswith("stranger")}
    assert {*strangers.values()} == {"stranger 1", "stranger 2"}
    assert len(strangers) == 7
    with open(tmp_path / "out" / "wrong_labels.csv", newline="") as source:
        (wrong,) = csv.DictReader(source)
    assert wrong["file"] == "cat/0.wav" and wrong["label"] == "bob"
    assert wrong["sounds_like"] == "a stranger"
    assert float(wrong["cosine_label"]) < 0.9
    printed = capsys.readouterr().out
    assert "7 files are of strangers; 1 labels look wrong" in printed
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "is labelled bob and sounds like a stranger" in page
    assert ">ann <small>4 files" in page
    who(encoder, audio, tmp_path / "out")  # without labels there are none
    assert not (tmp_path / "out" / "wrong_labels.csv").exists()


def test_labels_that_cannot_be_used_are_said_before_the_work(
    encoder, audio, tmp_path, capsys
):
    path = tmp_path / "labels.csv"
    path.write_text("utterance,speaker\nnobody.wav,ann\n")
    with pytest.raises(SystemExit, match="2"):
        who(encoder, audio, tmp_path / "out", f"--labels={path}")
    assert "such as 'nobody.wav'" in capsys.readouterr().err
    assert not (tmp_path / "out" / "embeddings" / "vectors.npy").exists()
    path.write_text("utterance,speaker\nann/0.wav,ann\n")
    with pytest.raises(SystemExit, match="2"):
        who(encoder, audio, tmp_path, f"--labels={path}", "--speakers=4")
    assert "--speakers=4 cannot be used with" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        who(encoder, audio, tmp_path, "--threshold=0.4", "--speakers=4")
    assert "--threshold would have no effect" in capsys.readouterr().err


def find(vectors, **options):
    """Speakers of embeddings, each of a file."""
    names = [str(row) for row in range(len(vectors))]
    manifest = Manifest.of((name, name, 0.0, 2.0, "") for name in names)
    found = Embeddings(manifest.ids, np.float32(vectors))
    return find_speakers("none", manifest, found, **options)


@pytest.fixture
def voices(monkeypatch):
    """40 speakers of whom an encoder's threshold would make far fewer."""
    monkeypatch.setattr(speakers, "read_threshold", lambda encoder: 0.6)
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(40), 5)
    vectors = rng.normal(size=(40, 24))[truth] + 1.5  # all have it in common
    return vectors + 0.5 * rng.normal(size=vectors.shape), truth


def test_the_number_of_speakers_does_not_hang_on_the_threshold(voices):
    vectors, truth = voices
    by_threshold = find(vectors, threshold=0.6)
    assert by_threshold.n_speakers < 20
    assert by_threshold.rule == "average linkage at a cosine of 0.600 (given)"
    speech = find(vectors)
    assert speech.n_speakers == pytest.approx(40, abs=2)
    assert adjusted_rand_score(truth, speech.labels) > 0.9
    assert speech.rule == "the clearest groups, by silhouette"
    right = silhouettes(normalised(vectors - vectors.mean(0)), speech.labels)
    assert np.corrcoef(right, speech.confidence)[0, 1] > 0.95


def test_files_of_one_speaker_and_files_of_one_each(voices):
    """No silhouette can tell these: the threshold does."""
    vectors, truth = voices
    assert find(vectors[truth == 7]).n_speakers == 1
    apart = find(vectors[:15:5] - vectors.mean(0))
    assert apart.n_speakers == 3 and "0.600" in apart.rule


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


def test_an_encoder_without_a_threshold(
    encoder, audio, tmp_path, capsys, monkeypatch
):
    """One is found by halves of these very files, and kept beside the store."""
    for name in ("hyperparams.yaml", "embedding_model.ckpt"):
        (tmp_path / name).write_bytes((encoder / name).read_bytes())
    yaml = tmp_path / "hyperparams.yaml"
    yaml.write_text(yaml.read_text().replace("threshold: 0.9\n", ""))
    mine = tmp_path / "mine"
    shutil.copytree(audio, mine)
    with monkeypatch.context() as patch:
        load, asked = speakers.load_extractor, []

        def note(*options):
            asked.append(options)
            return load(*options)

        patch.setattr(speakers, "load_extractor", note)
        rows = who(tmp_path, mine, tmp_path / "out", "--num_workers=1")
    assert asked == [(str(tmp_path), "cpu", 1)]
    said = capsys.readouterr().out
    assert "4 speakers in 16 files, by the clearest groups" in said
    with monkeypatch.context() as patch:
        patch.setattr(speakers, "load_extractor", pytest.fail)
        assert who(tmp_path, mine, tmp_path / "out") == rows
    assert capsys.readouterr().out == said
    kept = tmp_path / "out" / "embeddings" / "threshold.json"
    before = json.loads(kept.read_text())
    shutil.copy(mine / "ann" / "0.wav", mine / "new.wav")
    who(tmp_path, mine, tmp_path / "out")
    assert json.loads(kept.read_text())["made_from"] != before["made_from"]
    assert len(rows) == 16


@pytest.mark.parametrize("options", [["--speakers=99"], ["--speakers=0"]])
def test_speakers_that_cannot_be_are_refused_before_the_work(
    encoder, audio, tmp_path, capsys, options
):
    words = ["who", str(encoder), str(audio), str(tmp_path / "out"), *options]
    with pytest.raises(SystemExit):
        main([*words, "--device=cpu"])
    assert "must be from 1 to 16" in capsys.readouterr().err
    assert not (tmp_path / "out" / "speakers.csv").exists()
    assert not [*tmp_path.glob("out/embeddings/*.npy")]
