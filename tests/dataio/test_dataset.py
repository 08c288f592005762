"""Manifests to datasets: crops, reading, bad audio."""

import os
import random

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, strategies as st

from lgl_plugin.dataio import dataset
from lgl_plugin.dataio.audio import (
    BadAudio,
    audio_seconds,
    rate_problem,
    read_audio,
    wrap,
)
from lgl_plugin.dataio.bad_files import BadFiles
from lgl_plugin.dataio.dataset import (
    UtteranceDataset,
    crop_dataset,
    crop_spans,
    read_crops,
)
from lgl_plugin.dataio.manifest import Manifest


@pytest.fixture
def noise(tmp_path):
    """Two seconds of noise at 16 kHz: its path and its samples."""
    samples = np.random.default_rng(1).uniform(-0.5, 0.5, 32000)
    path = tmp_path / "noise.wav"
    soundfile.write(path, samples, 16000)
    return path, soundfile.read(path, dtype="float32")[0]


def manifest_of(**utterances):
    """A manifest of files, or of (file, duration)s, by ID."""
    rows = []
    for name, wav in utterances.items():
        wav, duration = wav if isinstance(wav, tuple) else (wav, 2.0)
        rows.append((name, str(wav), 0.0, duration, ""))
    return Manifest.of(rows)


# Reading


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_whole_file_as_soundfile_reads_it(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    tone = 0.3 * np.sin(np.arange(16000) / 20)
    soundfile.write(path, tone, 16000)
    expected = soundfile.read(path, dtype="float32")[0]
    np.testing.assert_array_equal(read_audio(path).numpy(), expected)


@given(start=st.integers(0, 31000), length=st.integers(1, 1000), data=st.data())
def test_part_of_a_file(tmp_path_factory, start, length, dataset):
    path = tmp_path_factory.getbasetemp() / "part.flac"
    if not path.exists():
        samples = np.random.default_rng(0).uniform(-0.5, 0.5, 32000)
        soundfile.write(path, samples, 16000)
    expected, _ = soundfile.read(
        path, frames=length, start=start, dtype="float32"
    )
    found = read_audio(path, start / 16000, length / 16000)
    np.testing.assert_array_equal(found.numpy(), expected)


def test_stereo_becomes_the_mean_of_its_channels(tmp_path):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (1000, 2))
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    expected = samples.astype(np.float32).mean(axis=1)
    found = read_audio(tmp_path / "a.wav")
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_resampling_keeps_duration_pitch_and_level(tmp_path):
    hertz, seconds = 440.0, 1.5
    tone = 0.4 * np.sin(2 * np.pi * hertz * np.arange(12000) / 8000)
    soundfile.write(tmp_path / "a.wav", tone, 8000, subtype="FLOAT")
    wav = read_audio(tmp_path / "a.wav", sample_rate=16000).numpy()
    assert len(wav) == seconds * 16000
    spectrum = np.abs(np.fft.rfft(wav * np.hanning(len(wav))))
    assert spectrum.argmax() * 16000 / len(wav) == pytest.approx(hertz, abs=1)
    expected = 0.4 * np.sin(2 * np.pi * hertz * np.arange(24000) / 16000)
    middle = slice(1000, -1000)  # the filter rings at the edges
    np.testing.assert_allclose(wav[middle], expected[middle], atol=2e-3)


def test_start_counts_seconds_at_any_rate(tmp_path):
    step = np.r_[np.zeros(4000), np.full(4000, 0.5)]
    soundfile.write(tmp_path / "a.wav", step, 8000)
    wav = read_audio(tmp_path / "a.wav", 0.5, 0.25, sample_rate=16000)
    assert len(wav) == 4000
    np.testing.assert_allclose(wav[100:-100], 0.5, atol=2e-3)


def test_bad_files_are_bad_audio(tmp_path):
    second = np.zeros(16000, dtype=np.float32)
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "corrupt.wav").write_bytes(b"RIFF, but no more than that")
    soundfile.write(tmp_path / "header.wav", second[:0], 16000)
    for bad in (np.nan, np.inf):
        second[77] = bad
        path = tmp_path / f"{bad}.wav"
        soundfile.write(path, second, 16000, subtype="FLOAT")
    second[77] = 1e30
    soundfile.write(tmp_path / "huge.wav", second, 16000, "FLOAT")
    second[77] = 0.5
    soundfile.write(tmp_path / "odd.wav", second, 15999)
    (tmp_path / "bare.raw").write_bytes(bytes(99))
    os.mkfifo(tmp_path / "pipe.wav")
    for name, words in {
        "missing.wav": "cannot be opened: No such file",
        "empty.wav": "is empty",
        "corrupt.wav": "cannot be read",
        "huge.wav": r"samples up to 1e\+30",
        "odd.wav": "15999 Hz, too odd",
        "bare.raw": "has no header",
        "pipe.wav": "is not a regular file",
        "header.wav": "no samples",
        "nan.wav": "not finite",
        "inf.wav": "not finite",
    }.items():
        with pytest.raises(BadAudio, match=words):
            read_audio(tmp_path / name)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
def test_usual_rates_are_not_odd(rate):
    assert rate_problem(rate, 16000) is None


def test_integers_written_as_floats_pass(tmp_path):
    tone = 32767 * np.sin(np.arange(16000) / 20)
    soundfile.write(tmp_path / "a.wav", tone, 16000, "FLOAT")
    assert read_audio(tmp_path / "a.wav").abs().max() > 30000


def test_how_long_a_file_is(tmp_path, noise):
    assert audio_seconds(noise[0]) == 2.0
    soundfile.write(tmp_path / "header.wav", np.zeros(0), 16000)
    with pytest.raises(BadAudio, match="no samples"):
        audio_seconds(tmp_path / "header.wav")


def test_reading_past_the_end_is_bad_audio(noise):
    with pytest.raises(BadAudio, match="no samples"):
        read_audio(noise[0], start=5.0, seconds=1.0)


# Crops


@given(length=st.integers(1, 50), wanted=st.integers(1, 200))
def test_wrap_repeats_from_the_beginning(length, wanted):
    wav = torch.arange(length)
    expected = np.resize(np.arange(length), wanted)  # numpy's wraps, too
    np.testing.assert_array_equal(wrap(wav, wanted).numpy(), expected)


@given(
    duration=st.floats(0.01, 1000.0),
    crop=st.floats(0.05, 10.0),
    n_crops=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_crops_are_disjoint_and_inside(duration, crop, n_crops, seed):
    spans = crop_spans(duration, crop, n_crops, random.Random(seed))
    assert len(spans) == n_crops
    lengths = {length for _, length in spans}
    assert lengths == {min(crop, duration / n_crops)}
    ends, tolerance = 0.0, 1e-9 * duration
    for start, length in sorted(spans):
        assert start >= ends - tolerance
        ends = start + length
    assert ends <= duration + tolerance


def test_crops_cover_all_places_in_both_orders():
    rng = random.Random(0)
    spans = [crop_spans(10.0, 1.0, 2, rng) for _ in range(4000)]
    first = np.array([a for (a, _), _ in spans])
    second = np.array([b for _, (b, _) in spans])
    assert np.mean(first < second) == pytest.approx(0.5, abs=0.05)
    # By symmetry both views have the same distribution, around the middle.
    for starts in (first, second):
        assert starts.mean() == pytest.approx(4.5, abs=0.2)
        assert starts.min() < 0.2 and starts.max() > 8.8


def test_crops_are_parts_of_the_file_and_disjoint(noise):
    path, samples = noise
    crops = read_crops(path, 0.0, 2.0, 0.75, 2, rng=random.Random(3))
    places = []
    for crop in crops.numpy():
        pairs = np.lib.stride_tricks.sliding_window_view(samples, 2)
        (start,) = np.flatnonzero((pairs == crop[:2]).all(axis=1))
        np.testing.assert_array_equal(crop, samples[start : start + 12000])
        places.append(start)
    assert abs(places[0] - places[1]) >= 12000 - 1  # to a rounded sample


def test_an_utterance_shorter_than_two_crops_is_shared_and_wrapped(noise):
    path, samples = noise
    crops = read_crops(path, 0.0, 1.0, 0.75, 2, rng=random.Random(0)).numpy()
    halves = [np.resize(half, 12000) for half in samples[:16000].reshape(2, -1)]
    if not np.array_equal(crops[0], halves[0]):
        halves.reverse()
    np.testing.assert_array_equal(crops, halves)


def test_crops_stay_inside_a_segment_of_a_long_file(tmp_path):
    loud = np.concatenate([np.full(16000, level) for level in (0.1, 0.5, 0.9)])
    soundfile.write(tmp_path / "a.wav", loud, 16000, subtype="FLOAT")
    for seed in range(20):
        rng = random.Random(seed)
        crops = read_crops(tmp_path / "a.wav", 1.0, 1.0, 0.3, 2, rng=rng)
        assert (crops == 0.5).all()


def test_a_silent_crop_gives_way_to_sound(tmp_path):
    samples = np.zeros(64000)
    samples[60000:60010] = 0.5
    soundfile.write(tmp_path / "a.wav", samples, 16000)
    for seed in range(5):
        rng = random.Random(seed)
        crops = read_crops(tmp_path / "a.wav", 0.0, 4.0, 0.5, 2, rng=rng)
        assert crops.shape == (2, 8000)
        assert crops.any(dim=1).all()


def test_sound_is_searched_in_stretches(tmp_path, monkeypatch):
    """Hours of silence are never held at once."""
    samples = np.zeros(64000)
    samples[60000:60010] = 0.5
    soundfile.write(tmp_path / "a.wav", samples, 16000)
    monkeypatch.setattr(dataset, "STRETCH_SECONDS", 0.75)
    read, sizes = soundfile.SoundFile.read, []

    def spy(self, frames, *arguments):
        sizes.append(frames)
        return read(self, frames, *arguments)

    monkeypatch.setattr(soundfile.SoundFile, "read", spy)
    rng = random.Random(1)
    crops = read_crops(tmp_path / "a.wav", 0.0, 4.0, 0.5, rng=rng)
    assert crops.any() and len(sizes) > 4 and max(sizes) == 12000


def test_silence_from_end_to_end_is_bad(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(16000), 16000)
    with pytest.raises(BadAudio, match="silent from end to end"):
        read_crops(tmp_path / "a.wav", 0.0, 1.0, 0.5)


# Datasets


def test_dataset_skips_bad_files_and_names_them(tmp_path, noise):
    (tmp_path / "b.wav").write_bytes(b"")
    soundfile.write(tmp_path / "c.wav", np.zeros(16000), 16000)
    data = crop_dataset(
        manifest_of(
            a=noise[0],
            b=tmp_path / "b.wav",
            c=(tmp_path / "c.wav", 1.0),
        ),
        np.arange(3),
        crop=0.5,
        labels=np.array([7, 8, 9]),
    )
    item = data[1]  # the next after b and c is a
    assert (item["id"], item["label"], item["row"]) == ("a", 7, 0)
    assert item["sig"].shape == (1, 8000)
    bad = [line.split("\t") for line in item["bad"].split("\n")]
    assert [name for name, _ in bad] == ["b", "c"]
    assert "silent" in bad[1][1]
    assert data[0]["bad"] == ""


def test_dataset_with_nothing_readable_ends(tmp_path):
    missing = manifest_of(a=tmp_path / "a", b=tmp_path / "b")
    data = crop_dataset(missing, np.arange(2), crop=0.5)
    with pytest.raises(BadAudio, match="none of the 2 utterances"):
        data[0]


def test_other_errors_are_not_swallowed():
    def read(wav):
        raise ZeroDivisionError

    data = UtteranceDataset(manifest_of(a="x"), np.arange(1))
    dataset.add_dynamic_item(read, takes="wav", provides="sig")
    dataset.set_output_keys(["sig"])
    with pytest.raises(ZeroDivisionError):
        data[0]


def test_rows_and_labels_choose_the_utterances(noise):
    data = crop_dataset(
        manifest_of(a=noise[0], b=noise[0], c=noise[0], d=noise[0]),
        np.array([3, 2, 1]),
        crop=0.5,
        labels=np.array([1, -1, 0, 2]),
    )
    items = [data[i] for i in range(len(dataset))]
    assert [(i["id"], i["row"], i["label"]) for i in items] == [
        ("d", 3, 2),
        ("c", 2, 0),
    ]
    assert type(items[0]["label"]) is int
    assert [item["id"] for item in dataset] == ["d", "c"]  # and no further


def test_crops_follow_from_seed_epoch_and_utterance(noise):
    manifest = manifest_of(a=noise[0], b=noise[0])
    rows = np.arange(2)
    data, again, other = (
        crop_dataset(manifest, rows, 0.25, n_crops=2, seed=seed)
        for seed in (1, 1, 2)
    )
    state = random.getstate()
    assert torch.equal(data[0]["sig"], data[0]["sig"])
    assert random.getstate() == state
    assert not torch.equal(data[0]["sig"], data[1]["sig"])
    assert not torch.equal(data[0]["sig"], other[0]["sig"])
    first = data[0]["sig"]
    dataset.set_epoch(1)
    assert not torch.equal(data[0]["sig"], first)
    again.set_epoch(1)
    assert torch.equal(data[0]["sig"], again[0]["sig"])


@pytest.mark.parametrize("persistent", [False, True])
def test_crops_do_not_depend_on_who_reads(noise, persistent):
    manifest = manifest_of(a=noise[0], b=noise[0], c=noise[0])
    data = crop_dataset(manifest, np.arange(3), 0.25, seed=3)
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=2, persistent_workers=persistent
    )
    for epoch in (1, 2):
        dataset.set_epoch(epoch)
        for here, there in zip(data, loader):
            assert torch.equal(here["sig"], there["sig"])


# The log of bad files


def test_bad_files_are_tolerated_up_to_the_limit(tmp_path):
    bad = BadFiles(tmp_path / "bad_files.txt", limit=2)
    bad.add([])
    assert not bad.path.exists()
    bad.add([("a", "silent"), ("b", "cannot be read:\n no such\tfile")])
    bad.add([("a", "silent")])  # known
    with pytest.raises(ValueError, match=r"3 bad .* the 2 that max_bad_share"):
        bad.add([("c", "silent")])
    assert bad.path.read_text().splitlines() == [
        "a\tsilent",
        "b\tcannot be read: no such file",
        "c\tsilent",
    ]


def test_bad_files_are_remembered_by_the_next_process(tmp_path):
    path = tmp_path / "bad_files.txt"
    BadFiles(path, limit=2).add([("a", "silent"), ("b", "silent")])
    again = BadFiles(path, limit=2)
    again.add([("b", "silent")])
    with pytest.raises(ValueError, match="3 bad utterances"):
        again.add([("c", "silent")])


def test_starting_again_does_not_lift_the_limit(tmp_path):
    path = tmp_path / "bad_files.txt"
    found = [("a", "silent"), ("b", "silent")]
    for _ in range(2):
        with pytest.raises(ValueError, match="2 bad utterances"):
            BadFiles(path, limit=1).add(found)
    with pytest.raises(ValueError, match="a: silent\n  b: silent"):
        BadFiles(path, limit=1).check()


def test_the_first_ten_are_shown(tmp_path):
    bad = BadFiles(tmp_path / "bad_files.txt", limit=3)
    with pytest.raises(ValueError, match="12 bad utterances") as error:
        bad.add([(f"u{n:02}", "silent") for n in range(12)])
    shown = [f"u{n:02}: silent" in str(error.value) for n in range(12)]
    assert shown == [True] * 10 + [False] * 2


@given(
    st.dictionaries(
        st.text(st.sampled_from("a\t\n\r\x1b\x85\u2028é\udce9\\")),
        st.text(),
        max_size=5,
    )
)
def test_any_name_and_reason_stay_one_line(tmp_path_factory, found):
    path = tmp_path_factory.mktemp("bad") / "bad_files.txt"
    bad = BadFiles(path, limit=9)
    bad.add(found.items())
    lines = path.read_text("utf-8").splitlines() if found else []
    assert [line.count("\t") for line in lines] == [1] * len(bad.reasons)
    assert BadFiles(path, limit=9).reasons == bad.reasons
    bad.add(found.items())  # known
    assert (path.read_text("utf-8").splitlines() if found else []) == lines


def test_a_damaged_log_of_bad_files_is_read_as_far_as_it_goes(tmp_path):
    path = tmp_path / "bad_files.txt"
    path.write_bytes(b"a\tsilent\n\xff\xfe\nb\tcut")
    assert {"a", "b"} < set(BadFiles(path, limit=9).reasons)


def test_a_file_that_turns_bad_stops_no_epoch(tmp_path, noise):
    """It is counted once; the others take its place from then on."""
    (tmp_path / "b.wav").write_bytes(noise[0].read_bytes())
    manifest = manifest_of(a=noise[0], b=tmp_path / "b.wav", c=noise[0])
    dataset = crop_dataset(manifest, np.arange(3), crop=0.5)
    bad = BadFiles(tmp_path / "bad_files.txt", limit=1)

    def epoch():
        items = [dataset[index] for index in range(3)]
        for item in items:
            lines = item["bad"].splitlines()
            bad.add(line.split("\t", 1) for line in lines)
        return [item["id"] for item in items]

    assert epoch() == ["a", "b", "c"]
    (tmp_path / "b.wav").unlink()
    for _ in range(3):
        assert epoch() == ["a", "c", "c"]
    reason = "cannot be opened: No such file or directory"
    assert bad.path.read_text() == f"b\t{reason}\n"
