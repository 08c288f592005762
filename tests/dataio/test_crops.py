"""Random crops: disjoint, inside, of sound where there is any."""

import math
import random

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, strategies as st

from lgl_plugin.dataio import audio
from lgl_plugin.dataio.audio import BadAudio, read_audio
from lgl_plugin.dataio.crops import crop_spans, read_crops, wrap


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


@given(
    duration=st.floats(0.01, 1000.0),
    crop=st.floats(0.05, 10.0),
    seed=st.integers(0, 1000),
)
def test_crops_that_may_overlap_are_as_long_as_the_utterance_lets_them_be(
    duration, crop, seed
):
    rng = random.Random(seed)
    for start, length in crop_spans(duration, crop, 2, rng, overlap=True):
        assert length == min(crop, duration)
        assert 0 <= start <= duration - length


def test_crops_that_may_overlap_are_drawn_independently():
    rng = random.Random(0)
    spans = [crop_spans(7.0, 4.0, 2, rng, overlap=True) for _ in range(4000)]
    first, second = np.array([[a, b] for (a, _), (b, _) in spans]).T
    for starts in (first, second):  # each evenly over 0 to 3 s
        assert starts.mean() == pytest.approx(1.5, abs=0.1)
        assert starts.std() == pytest.approx(3 / 12**0.5, abs=0.05)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.06


@pytest.mark.parametrize("speed", [80, 90, 100, 110, 125])
def test_speed_changes_pitch_and_not_length(tmp_path, speed):
    """A tone of 1 kHz; 0.5 s at 110 % are 0.55 s of the file."""
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000)
    soundfile.write(tmp_path / "a.wav", tone, 16000)
    crops = read_crops(tmp_path / "a.wav", 0.0, 1.0, 0.4, 2, speed=speed)
    assert crops.shape == (2, 6400)
    for crop in crops.numpy():
        power = np.abs(np.fft.rfft(crop * np.hanning(6400)))
        hertz = power.argmax() * 16000 / 6400
        assert hertz == pytest.approx(10 * speed, abs=2.6)
        assert crop[200:-200].std() == pytest.approx(0.5 / 2**0.5, rel=0.02)


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


@pytest.fixture
def bursts(tmp_path):
    """20 s, silent but for half a second every four; samples tell their time.

    In seconds over 100; the first burst begins at 2 s.
    """
    times = np.arange(320000) / 16000
    samples = np.where((times % 4 >= 2) & (times % 4 < 2.5), times / 100, 0.0)
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    return tmp_path / "a.wav"


def times_of(crop):
    """The seconds of a file of bursts that a crop holds, as a set."""
    return {round(1600000 * sample) for sample in crop.tolist() if sample}


def test_crops_of_a_mostly_silent_utterance_are_many(bursts):
    places = set()
    for seed in range(20):
        rng, other = random.Random(seed), random.Random(seed)
        one, two = crops = read_crops(bursts, 0.0, 20.0, 0.4, 2, rng=rng)
        assert times_of(one) and times_of(two)
        assert not times_of(one) & times_of(two)
        places |= {min(times_of(one)), min(times_of(two))}
        assert torch.equal(
            crops, read_crops(bursts, 0.0, 20.0, 0.4, 2, rng=other)
        )
        # The crops of other utterances do not depend on this one's silence.
        other.seed(seed)
        crop_spans(20.0, 0.4, 2, other)
        assert rng.random() == other.random()
    assert len(places) > 20


def test_sound_is_searched_from_the_silent_crop_on(bursts, monkeypatch):
    monkeypatch.setattr(audio, "SEARCH_SECONDS", 0.6)
    found = []
    for place in (1.0, 7.0, 19.0):  # the last goes on at the beginning
        spans = [(place, 0.4)]
        monkeypatch.setattr(
            f"{crop_spans.__module__}.crop_spans", lambda *_, s=spans: s
        )
        found.append(100 * read_crops(bursts, 0.0, 20.0, 0.4).max())
    np.testing.assert_allclose(found, [2.25, 10.25, 2.25], atol=0.26)


def test_a_replaced_crop_overlaps_none_where_there_is_sound_elsewhere(
    bursts, monkeypatch
):
    monkeypatch.setattr(audio, "SEARCH_SECONDS", 0.6)
    spans = [(0.0, 0.5), (2.0, 0.5), (1.0, 0.5)]
    monkeypatch.setattr(f"{crop_spans.__module__}.crop_spans", lambda *_: spans)
    one, given, two = map(times_of, read_crops(bursts, 0.0, 20.0, 0.5, 3))
    assert one and given and two
    assert not (one & given or one & two or given & two)


def test_the_only_sound_is_in_all_crops(bursts, monkeypatch):
    spans = [(0.0, 0.5), (1.0, 0.5)]
    monkeypatch.setattr(f"{crop_spans.__module__}.crop_spans", lambda *_: spans)
    for crop in read_crops(bursts, 0.0, 2.1, 0.5, 2):
        assert times_of(crop) == {*range(32000, 33600)}


def test_a_silent_beginning_is_not_read(bursts):
    for offset, duration, expected in (
        (2.0, 9.0, (2.0, 3.0)),  # has sound
        (3.0, 9.0, (6.0, 7.0)),
        (3.0, 3.2, (6.0, 6.2)),  # as far as the utterance goes
        (3.0, math.inf, (6.0, 7.0)),
    ):
        wav = audio.read_beginning(bursts, offset, duration, 1.0)
        start, end = expected
        assert torch.equal(wav, read_audio(bursts, start, end - start))
    with pytest.raises(BadAudio, match="silent: no sample"):
        audio.read_beginning(bursts, 2.6, 3.4, 1.0)


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
    with pytest.raises(BadAudio, match="silent: no sample"):
        read_crops(tmp_path / "a.wav", 0.0, 1.0, 0.5)


@given(length=st.integers(1, 50), wanted=st.integers(1, 200))
def test_wrap_repeats_from_the_beginning(length, wanted):
    wav = torch.arange(length)
    expected = np.resize(np.arange(length), wanted)  # numpy's wraps, too
    np.testing.assert_array_equal(wrap(wav, wanted).numpy(), expected)
