"""The verdict without labels: what is compared, by what error, how surely."""

import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster, linkage

from lgl_plugin.adaptation import verdict as module
from lgl_plugin.adaptation.rungs import Rung
from lgl_plugin.adaptation.verdict import Verdict, count_speakers, judge
from lgl_plugin.clustering.kmeans import TorchKMeans
from lgl_plugin.clustering.number import estimate
from lgl_plugin.inference.backends import Whitening
from lgl_plugin.metrics.error_rates import Resampled, eer


def heard(noise, speakers=16, each=5, size=16, seed=0, of=1):
    """Recordings of speakers, so many of each, and so much noise."""
    voices = np.random.default_rng(of).normal(size=(speakers, size))
    voices = np.repeat(voices, each, axis=0)
    noisy = noise * np.random.default_rng(seed).normal(size=voices.shape)
    return (voices + noisy).astype(np.float32)


def test_less_noise_is_better_and_more_is_worse():
    some, less = heard(1.0), heard(0.5, seed=2)
    good, bad = judge(some, less, 16), judge(less, some, 16)
    assert (good.sign, bad.sign) == (-1, 1)
    assert (good.before, good.after) == (bad.after, bad.before)
    assert good.low <= good.after - good.before <= good.high < 0
    assert str(good).startswith("better: ") and "80 recordings" in str(good)
    assert str(bad).startswith("worse: ")


def test_equal_encoders_differ_by_nothing():
    """Also where only the length of embeddings and their axes differ."""
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    before = heard(1.0)
    for after in (before, 3 * before @ turn.astype(np.float32)):
        found = judge(before, after, 16)
        assert found.sign == 0 and abs(found.high - found.low) < 0.3
        assert "no difference that these 80 recordings can show" in str(found)


def test_trials_are_the_pairs_on_which_both_clusterings_agree():
    """Against scipy's clusters, and the error rates against `eer`."""
    sides = heard(0.6), heard(0.8, seed=2)
    units = [side / np.linalg.norm(side, axis=1)[:, None] for side in sides]
    first, second = np.triu_indices(80, 1)
    together = []
    for unit in units:
        found = fcluster(linkage(unit, "ward"), 16, "maxclust")
        together.append(found[first] == found[second])
    agreed = together[0] == together[1]
    assert not agreed.all()
    labels = together[0][agreed]
    expected = [
        100 * eer((unit @ unit.T)[first, second][agreed], labels)[0]
        for unit in units
    ]
    found = judge(*sides, 16)
    assert found.recordings == 80
    assert [found.before, found.after] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("most", [1500, 150])
def test_of_many_trials_some_are_drawn(monkeypatch, most):
    """Of non-targets alone, and of about 300 targets, too."""
    some, less = heard(1.0, 32), heard(0.6, 32, seed=2)
    every = judge(some, less, 32)
    monkeypatch.setattr(module, "MOST", most)
    fewer = judge(some, less, 32)
    assert fewer.before == pytest.approx(every.before, abs=1)
    assert fewer.after == pytest.approx(every.after, abs=1)
    assert fewer != every


def test_a_recording_drawn_twice_is_as_if_it_were_there_twice():
    """The weights of the bootstrap, against trials written out."""
    rng = np.random.default_rng(3)
    units = module.normalised(heard(0.8, 4, 3))
    speakers = np.repeat(np.arange(4), 3)
    first, second, labels = module._trials([speakers] * 2, rng)
    scores = np.einsum("td,td->t", units[first], units[second])
    times = rng.integers(0, 4, 12)
    found = Resampled(scores, labels, first, second).eer(times)
    weight = times[first] * times[second]
    expected = eer(np.repeat(scores, weight), np.repeat(labels, weight))[0]
    assert found == pytest.approx(expected)


def test_neither_encoder_is_favoured():
    """Swapped, the trials are the same, and the interval turns around."""
    one, other = heard(1.0), heard(1.2, seed=2)
    there, back = judge(one, other, 16), judge(other, one, 16)
    assert (there.before, there.after) == (back.after, back.before)
    assert there.low == pytest.approx(-back.high)


def test_fewer_recordings_show_less():
    wide, narrow = (
        judge(heard(0.9, n), heard(0.8, n, seed=2), n) for n in (8, 60)
    )
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_encoders_that_agree_on_nothing_are_not_judged(monkeypatch):
    """As where a training ended in embeddings that are all alike."""
    alike = 1 + 1e-6 * np.random.default_rng(0).random((80, 16))
    monkeypatch.setattr(module, "FEWEST_TARGETS", 80)
    with pytest.raises(ValueError, match="pairs are of one cluster before"):
        judge(heard(0.5), alike, 40)
    monkeypatch.undo()
    assert judge(heard(0.5), alike, 16).sign == 1


def test_speakers_are_counted():
    assert count_speakers(heard(0.3, 20, 6)) == 20


def test_few_recordings_are_judged_where_their_groups_are_clear():
    """Of four speakers or more: by fewer, verdicts were wrong."""
    few = heard(0.6, speakers=6, each=5, size=64)
    white = Whitening(1.0).fit_transform(few)
    assert estimate(TorchKMeans(100), white).is_guess
    assert count_speakers(few) == 6
    for unclear in heard(2.0, 6, 5, 64), heard(0.6, 3, 10, 192):
        with pytest.raises(ValueError, match="no clear groups among 30 rec"):
            count_speakers(unclear)


def test_recordings_of_which_no_two_are_of_one_speaker_are_refused():
    with pytest.raises(ValueError, match="no clear groups among 80 recording"):
        count_speakers(heard(0.1, speakers=80, each=1, size=64))


@pytest.mark.parametrize("session", [1.4, 0.6])
def test_nothing_is_decided_where_clusters_are_sessions(session, monkeypatch):
    """Fifteen speakers in four sessions each are counted as sixty.

    An encoder that hears more of the session would win, and one that hears
    less would lose, each against the truth.
    """
    monkeypatch.setattr(module, "RESAMPLES", 100)  # for speed
    rng = np.random.default_rng(0)
    voices = np.repeat(rng.normal(size=(15, 64)), 32, axis=0)
    rooms = np.repeat(rng.normal(size=(60, 64)), 8, axis=0)
    before, after = (
        voices + share * rooms + 1.2 * rng.normal(size=voices.shape)
        for share in (1.0, session)
    )
    number = count_speakers(before)
    assert 50 < number < 70
    found = judge(before, after, number)
    assert found.sign == 0 and found.opposite in (number // 2, number // 4)
    assert (found.after < found.before) == (session > 1)
    assert f"is sure ({found.opposite} clusters say the opp" in str(found)
    assert "opposite" in Rung("whitening", found).cells()[4]
    assert found.word == "no difference"
    by_speakers = judge(before, after, 15)
    assert by_speakers.sign == (1 if session > 1 else -1)


def test_recordings_must_be_the_same_and_enough():
    with pytest.raises(ValueError, match="of 80 and 75 recordings"):
        judge(heard(1.0), heard(1.0, 15), 16)
    few = heard(1.0, 3, 3)
    for call in (lambda: judge(few, few, 3), lambda: count_speakers(few)):
        with pytest.raises(
            ValueError, match="are 9 recordings, and a verdict takes 10"
        ):
            call()


def test_an_interval_that_touches_nothing_decides_nothing():
    assert Verdict(50, 5.0, 4.0, -2.0, 0.0).sign == 0
    assert Verdict(50, 5.0, 4.0, -2.0, -0.1).sign == -1
    assert Verdict(50, 4.0, 5.0, 0.1, 2.0).sign == 1
