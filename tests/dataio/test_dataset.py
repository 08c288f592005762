"""Manifests to datasets: crops and the utterances that replace bad ones."""

import random

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, strategies as st

from lgl_plugin.dataio import audio
from lgl_plugin.dataio.audio import BadAudio
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


# Crops


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
    monkeypatch.setattr(audio, "SEARCH_SECONDS", 0.75)
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
    data.add_dynamic_item(read, takes="wav", provides="sig")
    data.set_output_keys(["sig"])
    with pytest.raises(ZeroDivisionError):
        data[0]


def test_rows_and_labels_choose_the_utterances(noise):
    data = crop_dataset(
        manifest_of(a=noise[0], b=noise[0], c=noise[0], d=noise[0]),
        np.array([3, 2, 1]),
        crop=0.5,
        labels=np.array([1, -1, 0, 2]),
    )
    items = [data[i] for i in range(len(data))]
    assert [(i["id"], i["row"], i["label"]) for i in items] == [
        ("d", 3, 2),
        ("c", 2, 0),
    ]
    assert type(items[0]["label"]) is int
    assert [item["id"] for item in data] == ["d", "c"]  # and no further


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
    data.set_epoch(1)
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
        data.set_epoch(epoch)
        for here, there in zip(data, loader):
            assert torch.equal(here["sig"], there["sig"])


def test_a_file_that_turns_bad_stops_no_epoch(tmp_path, noise):
    """It is counted once; the others take its place from then on."""
    (tmp_path / "b.wav").write_bytes(noise[0].read_bytes())
    manifest = manifest_of(a=noise[0], b=tmp_path / "b.wav", c=noise[0])
    data = crop_dataset(manifest, np.arange(3), crop=0.5)
    bad = BadFiles(tmp_path / "bad_files.txt", limit=1)

    def epoch():
        items = [data[index] for index in range(3)]
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
