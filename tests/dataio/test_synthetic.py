"""The embedded corpus: same seed same bytes, layout, trials, channel."""

import collections
import json
import pathlib
import wave

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from lgl_plugin.cli.main import main
from lgl_plugin.dataio import synthetic

SIZE = {
    "speakers": 2,
    "test_speakers": 4,
    "sessions": 2,
    "utterances": 2,
    "seconds": (1.0, 2.0),
    "seed": 3,
}


def read(path):
    with wave.open(str(path)) as source:
        assert source.getframerate() == 16000
        assert source.getnchannels() == 1
        assert source.getsampwidth() == 2
        return np.frombuffer(source.readframes(source.getnframes()), "<i2")


def contents(folder):
    folder = pathlib.Path(folder)
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "corpus"
    assert synthetic.make_corpus(folder, **SIZE, workers=2)
    return folder


def test_layout_is_voxcelebs(corpus):
    names = ["f000", "m001", "f002", "m003", "f004", "m005"]
    expected = {
        f"wav/{name}/s{session:02d}/{utterance:03d}.wav"
        for name in names
        for session in range(2)
        for utterance in range(2)
    }
    assert set(contents(corpus)) == expected | {"trials.txt", "corpus.json"}
    record = json.loads((corpus / "corpus.json").read_text())
    assert record["training"] == names[:2]
    assert record["held_out"] == names[2:]


def test_utterances_last_as_asked_and_have_sound(corpus):
    for path in (corpus / "wav").rglob("*.wav"):
        signal = read(path)
        assert 1.0 <= len(signal) / 16000 <= 2.0
        assert 3000 < np.abs(signal.astype(int)).max() < 32767


def test_no_two_utterances_are_alike(corpus):
    wavs = [path.read_bytes() for path in (corpus / "wav").rglob("*.wav")]
    assert len(set(wavs)) == len(wavs)


def test_trials_are_over_held_out_speakers(corpus):
    held_out = {"f002", "m003", "f004", "m005"}
    labels = collections.Counter()
    for line in (corpus / "trials.txt").read_text().splitlines():
        label, *files = line.split(" ")
        assert label in "01" and len(files) == 2
        assert {name.split("/")[0] for name in files} <= held_out
        assert all((corpus / "wav" / name).is_file() for name in files)
        labels[label] += 1
    # Two utterances of one session by two of the other: four target pairs.
    assert labels == {"1": 4 * 4, "0": 4 * 4}


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 99),
    speakers=st.integers(4, 9),
    first=st.integers(0, 9),
    sessions=st.integers(2, 4),
    utterances=st.integers(1, 5),
)
def test_trials_are_balanced(seed, speakers, first, sessions, utterances):
    names = synthetic.speaker_names(speakers, first)
    trials = synthetic.draw_trials(
        np.random.default_rng(seed), names, sessions, utterances
    )
    assert trials == synthetic.draw_trials(
        np.random.default_rng(seed), names, sessions, utterances
    )
    pairs = {frozenset((a, b)) for _, a, b in trials}
    assert len(pairs) == len(trials)
    counts = {1: collections.Counter(), 0: collections.Counter()}
    for label, a, b in trials:
        (spk_a, ses_a, _), (spk_b, ses_b, _) = a.split("/"), b.split("/")
        assert label == (spk_a == spk_b)
        assert spk_a[0] == spk_b[0]
        assert not label or ses_a != ses_b
        counts[label][spk_a] += 1
    across = sessions * (sessions - 1) // 2 * utterances**2
    for label in counts:
        assert counts[label] == dict.fromkeys(names, min(100, across))


def test_bytes_do_not_depend_on_workers_or_process(corpus, tmp_path):
    assert synthetic.make_corpus(tmp_path / "again", **SIZE, workers=1)
    expected = contents(corpus)
    assert contents(tmp_path / "again") == expected
    # Here, in another process, after another speaker.
    synthetic.make_speaker(tmp_path, "m001", {**SIZE, "seed": 4})
    other = contents(tmp_path / "m001")
    synthetic.make_speaker(tmp_path / "here", "m001", SIZE)
    for name, data in contents(tmp_path / "here").items():
        assert data == expected[f"wav/{name}"]
        assert data != other[name.removeprefix("m001/")]


def test_a_finished_corpus_is_not_made_again(corpus):
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    assert not synthetic.make_corpus(corpus, **SIZE)
    assert before == {
        path: path.stat().st_mtime_ns for path in corpus.rglob("*")
    }


def test_other_settings_in_the_same_folder(corpus):
    with pytest.raises(FileExistsError, match="seed 3 there, 5 asked for"):
        synthetic.make_corpus(corpus, **{**SIZE, "seed": 5})


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no corpus.json"):
        synthetic.make_corpus(tmp_path, **SIZE)
    assert contents(tmp_path) == {"thesis.txt": b"mine"}


def test_an_interrupted_corpus_is_made_afresh(tmp_path, monkeypatch):
    folder = tmp_path / "corpus"
    size = {**SIZE, "speakers": 1, "utterances": 1}

    def interrupt(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "draw_trials", interrupt)
        with pytest.raises(OSError, match="no space left"):
            synthetic.make_corpus(folder, **size, workers=1)
    assert not folder.exists()
    assert synthetic.make_corpus(folder, **size, workers=1)
    assert list(tmp_path.iterdir()) == [folder]
    assert len(list(folder.rglob("*.wav"))) == 5 * 2


def test_a_place_that_cannot_be_written_is_named_at_once(tmp_path, capsys):
    """Below a file, since root may write anywhere else."""
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        main(["corpus", str(tmp_path / "file" / "corpus")])
    (line,) = capsys.readouterr().err.splitlines()  # and no bar
    assert "a file is in the folder's place" in line and "Name another" in line


def test_a_full_disk_is_named_with_what_to_do(tmp_path):
    """The kernel's own limit, as a stand-in; workers inherit it."""
    resource = pytest.importorskip("resource")
    size = {**SIZE, "speakers": 1, "utterances": 1}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="grow so large.*Make room"):
            synthetic.make_corpus(tmp_path / "corpus", **size, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "setting, value",
    [
        ("speakers", 0),
        ("test_speakers", 3),
        ("sessions", 1),
        ("utterances", 0),
        ("seed", -1),
        ("seconds", (3.0, 2.0)),
        ("seconds", (0.0, 2.0)),
    ],
)
def test_settings_that_make_no_corpus(tmp_path, setting, value):
    with pytest.raises(ValueError, match=f"^{setting} (is|must be) "):
        synthetic.make_corpus(tmp_path, **{**SIZE, setting: value})


def test_command_line_refuses_in_words(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["corpus", str(tmp_path / "corpus"), "--sessions", "1"])
    assert stop.value.code == 2
    assert "sessions must be 2 or more, got 1" in capsys.readouterr().err


@pytest.fixture
def plain_channel():
    """A channel that only resamples."""
    channel = synthetic.Channel(np.random.default_rng(0), 32000)
    channel.response = np.ones_like(channel.response)
    channel.noise = np.ones_like(channel.noise)
    channel.snr, channel.peak = 100, 0.5
    return channel


def test_channel_resamples(plain_channel):
    def tone(rate, amplitude):
        return amplitude * np.sin(2 * np.pi * 1000 * np.arange(rate) / rate)

    speech = tone(22050, 9000).astype(np.int16)
    signal = plain_channel.apply(np.random.default_rng(0), speech)
    assert signal.shape == (16000,)
    middle = slice(1000, -1000)  # the cut tone rings at its ends
    expected = tone(16000, 1.0)[middle]
    gain = np.dot(signal[middle], expected) / np.dot(expected, expected)
    residue = signal[middle] - gain * expected
    assert np.abs(residue).max() < 0.003 * gain


def test_channel_adds_noise_at_its_ratio(plain_channel):
    plain_channel.snr = 10
    # The tone is the first bin of its own spectrum; all else is noise.
    speech = 9000 * np.sin(2 * np.pi * 1000 * np.arange(22050) / 22050)
    ratios = []
    for seed in range(20):
        signal = plain_channel.apply(
            np.random.default_rng(seed), speech.astype(np.int16)
        )
        power = np.abs(np.fft.rfft(signal)) ** 2
        ratios.append(10 * np.log10(power[1000] / (power.sum() - power[1000])))
    assert np.mean(ratios) == pytest.approx(10, abs=0.7)
    assert np.std(ratios) > 0.3  # each utterance has a ratio of its own
