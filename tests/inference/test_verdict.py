"""The verdict without labels: what is compared, by what error, how surely."""

import dataclasses

import numpy as np
import pytest
import soundfile
from speechbrain.lobes.features import Fbank

from lgl_plugin.dataio.manifest import Manifest
from lgl_plugin.inference import verdict as module
from lgl_plugin.inference.backends import Backend, Identity
from lgl_plugin.inference.extractor import Extractor
from lgl_plugin.inference.verdict import Parts, Verdict, embed_parts, judge
from lgl_plugin.metrics.error_rates import Resampled, eer
from lgl_plugin.nnet.encoders import Encoder, LogMelStatistics


def heard(noise, number=80, size=8, seed=0, of=1):
    """Parts of recordings of one voice each, and so much noise."""
    voice = np.random.default_rng(of).normal(size=(number, 1, size))
    rng = np.random.default_rng(seed)
    parts = voice + noise * rng.normal(size=(2, number, 2, size))
    return Parts(np.arange(number), *parts.astype(np.float32))


def test_less_noise_is_better_and_more_is_worse():
    some, less = heard(1.0), heard(0.5, seed=2)
    good, bad = judge(some, less), judge(less, some)
    assert (good.sign, bad.sign) == (-1, 1)
    assert (good.before, good.after) == (bad.after, bad.before)
    assert good.low <= good.after - good.before <= good.high < 0
    assert str(good).startswith("better: ") and "80 recordings" in str(good)
    assert str(bad).startswith("worse: ")


def test_equal_encoders_differ_by_nothing():
    """Also where only the length of embeddings and their axes differ."""
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    before = heard(1.0)
    for after in (
        before,
        before.through(Identity().fit(before.first[:, 0])),
        before.through(Backend(np.zeros(8), 3 * turn)),
    ):
        found = judge(before, after)
        assert found.sign == 0 and abs(found.high - found.low) < 0.3
        assert "no difference that these 80 recordings can show" in str(found)


def test_the_error_rates_are_those_of_the_trials():
    """All other recordings are trials where there are few of them."""
    parts = heard(1.5, number=12)
    scores = parts.scores()
    for copy in range(2):
        first, second = (
            part[:, copy] / np.linalg.norm(part[:, copy], axis=1, keepdims=True)
            for part in (parts.first, parts.second)
        )
        np.testing.assert_allclose(
            scores[:, :, copy], first @ second.T, atol=1e-6
        )
    i, j = module._trials(scores, scores, np.random.default_rng(0))
    assert sorted(zip(i[:12], j[:12])) == [(n, n) for n in range(12)]
    # Of eleven others the nearest is left out: it may be the same speaker.
    mean = scores.mean(axis=2)
    mean = mean + mean.T
    np.fill_diagonal(mean, -np.inf)
    for n in range(12):
        left = {*range(12)} - {n, int(mean[n].argmax())}
        assert sorted(j[12:][i[12:] == n]) == sorted(left)
    rate = eer(scores[i, j].ravel(), np.repeat(i == j, 2))[0]
    assert judge(parts, parts).before == pytest.approx(100 * rate)


def test_a_recording_drawn_twice_is_as_if_it_were_there_twice():
    """The weights of the bootstrap, against trials written out."""
    scores = heard(1.5, number=12).scores()
    i, j = module._trials(scores, scores, np.random.default_rng(0))
    pairs = scores[i, j]
    times = np.random.default_rng(3).integers(0, 4, 12)
    sides = [np.repeat(side, pairs.shape[1]) for side in (i, j)]
    found = Resampled(pairs.ravel(), sides[0] == sides[1], *sides).eer(times)
    weight = np.where(i == j, times[i], times[i] * times[j])
    expected = eer(
        np.repeat(pairs, weight, axis=0).ravel(),
        np.repeat(np.repeat(i == j, weight), pairs.shape[1]),
    )[0]
    assert found == pytest.approx(expected)


def test_neither_encoder_is_favoured():
    """Swapped, the same trials are drawn, and the interval turns around."""
    one, other = heard(1.0), heard(1.2, seed=2)
    there, back = judge(one, other), judge(other, one)
    assert (there.before, there.after) == (back.after, back.before)
    assert there.low == pytest.approx(-back.high)


def test_fewer_recordings_show_less():
    wide, narrow = (
        judge(heard(1.0, number=n), heard(0.9, number=n, seed=2))
        for n in (20, 200)
    )
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


@pytest.mark.parametrize("seed", range(3))
def test_the_interval_covers_what_many_recordings_show(seed):
    many = judge(heard(1.2, 400), heard(0.9, 400, seed=2))
    few = judge(
        heard(1.2, 60, of=seed + 5, seed=seed + 10),
        heard(0.9, 60, of=seed + 5, seed=seed + 20),
    )
    assert few.low - 1 < many.after - many.before < few.high + 1


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    """Sixteen short recordings, as rows of a manifest."""
    folder, rows = tmp_path_factory.mktemp("audio"), []
    rng = np.random.default_rng(0)
    for n in range(16):
        wav = np.convolve(rng.normal(size=19200), rng.normal(size=24))
        path = str(folder / f"{n}.wav")
        soundfile.write(path, 0.05 * wav / wav.std(), 16000)
        rows.append((str(n), path, 0.0, 1.2, ""))
    return rows


@pytest.fixture
def extract():
    return Extractor(Encoder(Fbank(n_mels=40), LogMelStatistics()))


def test_both_encoders_hear_the_same(extract, listed):
    """Whatever ran before; another seed hears otherwise."""
    manifest = Manifest.of(listed)
    found = [embed_parts(extract, manifest, range(16), s) for s in (0, 0, 1)]
    np.testing.assert_array_equal(found[0].second, found[1].second)
    assert not np.allclose(found[0].second, found[2].second)
    plain, changed = found[0].first.swapaxes(0, 1)
    assert not np.allclose(plain, changed, atol=0.1)
    twice = judge(found[0], found[1])
    assert twice.low == twice.high == 0


def test_what_cannot_be_read_or_is_too_short_is_left_out(extract, listed):
    rows = [*listed]
    rows[3] = ("missing", "missing.wav", 0.0, 2.0, "")
    rows[5] = ("short", rows[5][1], 0.0, 0.9, "")
    parts = embed_parts(extract, Manifest.of(rows), range(16))
    assert parts.rows.tolist() == [n for n in range(16) if n not in (3, 5)]
    with pytest.raises(ValueError, match="9 recordings of 1 s or more"):
        embed_parts(extract, Manifest.of(rows), range(6, 15))


def test_embeddings_that_are_not_finite_are_left_out(extract, listed):
    def spoil(encoder, inputs, embeddings):
        if len(embeddings) > 7:  # the last batch has one recording
            embeddings[7] = np.nan  # the second part of the fourth recording

    extract.encoder.register_forward_hook(spoil)
    rows = [*listed, ("17", *listed[0][1:])]
    parts = embed_parts(extract, Manifest.of(rows), range(17))
    assert parts.rows.tolist() == [n for n in range(17) if n != 3]
    assert np.isfinite(parts.scores()).all()


def test_recordings_must_be_the_same_and_enough():
    parts = heard(1.0)
    with pytest.raises(ValueError, match="not of the same recordings"):
        judge(parts, dataclasses.replace(parts, rows=parts.rows + 1))
    with pytest.raises(ValueError, match="needs 10 recordings, got 9"):
        judge(heard(1.0, number=9), heard(1.0, number=9))


def test_an_interval_that_touches_nothing_decides_nothing():
    assert Verdict(50, 5.0, 4.0, -2.0, 0.0).sign == 0
    assert Verdict(50, 5.0, 4.0, -2.0, -0.1).sign == -1
    assert Verdict(50, 4.0, 5.0, 0.1, 2.0).sign == 1
