"""Scores and error rates, against slow independent versions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from sklearn.metrics import roc_curve
from speechbrain.utils import metric_stats

from lgl_plugin.dataio.trials import Trials
from lgl_plugin.evaluation import verification
from lgl_plugin.evaluation.verification import (
    adaptive_s_norm,
    bootstrap_eer,
    cohort_statistics,
    cosine_scores,
    verify,
    write_scores,
)
from lgl_plugin.metrics.error_rates import eer, min_dcf


def trial_scores(n_target, n_nontarget, seed=0, decimals=None):
    """Two overlapping score distributions; rounding makes ties."""
    rng = np.random.default_rng(seed)
    scores = np.r_[rng.normal(1, 1, n_target), rng.normal(0, 1, n_nontarget)]
    labels = np.r_[np.ones(n_target, bool), np.zeros(n_nontarget, bool)]
    order = rng.permutation(len(scores))
    scores = scores if decimals is None else scores.round(decimals)
    return scores[order], labels[order]


# A few distinct values, so that ties within and across classes are common.
some_trials = st.lists(
    st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=40
).filter(lambda trials: len({label for _, label in trials}) == 2)


def columns(trials):
    scores, labels = zip(*trials, strict=True)
    return np.array(scores, float), np.array(labels)


# ------------------------------------------------------------ scores


def random_trials(n_utterances, n_trials, seed=0):
    rng = np.random.default_rng(seed)
    return Trials(
        rng.random(n_trials) < 0.5,
        [f"u{n}" for n in range(n_utterances)],
        rng.integers(0, n_utterances, n_trials),
        rng.integers(0, n_utterances, n_trials),
    )


@pytest.mark.parametrize("n_trials", [1, 500, 16384, 40000])
def test_cosine_scores_against_float64(n_trials):
    trials = random_trials(50, n_trials)
    embeddings = np.random.default_rng(1).normal(size=(50, 192)) * 7
    unit = embeddings / np.sqrt((embeddings**2).sum(1, keepdims=True))
    expected = (unit @ unit.T)[trials.enrolment, trials.test]
    scores = cosine_scores(embeddings.astype(np.float32), trials)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_cosine_score_of_zeros_is_zero():
    trials = random_trials(3, 20)
    assert not cosine_scores(np.zeros((3, 4), np.float32), trials).any()


def test_embeddings_must_match_and_be_finite():
    trials = random_trials(3, 5)
    with pytest.raises(ValueError, match=r"\(4, 2\).*3 utterances"):
        cosine_scores(np.ones((4, 2)), trials)
    embeddings = np.ones((3, 2))
    embeddings[1, 0] = np.nan
    with pytest.raises(ValueError, match="1 of 3 embeddings.* u1"):
        cosine_scores(embeddings, trials)


def test_write_scores(tmp_path):
    trials = random_trials(5, 30)
    scores = np.random.default_rng(2).normal(size=30).astype(np.float32)
    path = tmp_path / "new" / "scores.txt"
    write_scores(path, trials, scores)
    rows = [line.split() for line in path.read_text().splitlines()]
    assert [row[0] for row in rows] == [f"u{n}" for n in trials.enrolment]
    assert [row[1] for row in rows] == [f"u{n}" for n in trials.test]
    assert [row[2] for row in rows] == [str(int(x)) for x in trials.labels]
    np.testing.assert_allclose(
        [float(row[3]) for row in rows], scores, atol=1e-6
    )


def test_write_scores_keeps_the_old_file_on_a_mismatch(tmp_path):
    path = tmp_path / "scores.txt"
    path.write_text("old")
    with pytest.raises(ValueError):
        write_scores(path, random_trials(5, 30), np.zeros(29))
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["scores.txt"]


# ------------------------------------------------------------ error rates


def test_eer_by_hand():
    # Separable; inverted; one of two wrong on each side.
    assert eer([3, 4, 1, 2], [1, 1, 0, 0]) == (0.0, 2.5)
    assert eer([1, 2, 3, 4], [1, 1, 0, 0])[0] == 1.0
    assert eer([4, 2, 3, 1], [1, 1, 0, 0]) == (0.5, 2.5)
    # No cut gives equal rates: from (FAR, FRR) = (1, 0) to (0, 1/3) when
    # the non-target and the lowest target tie, FAR = 1 - 3 FRR.
    assert eer([1, 2, 3, 1], [1, 1, 1, 0])[0] == pytest.approx(1 / 4)
    # Equal scores cannot be told apart, whatever their order.
    assert eer([5, 5, 5, 5], [1, 0, 0, 1]) == (0.5, 5.0)


def sklearn_eer(scores, labels):
    p_fa, p_hit, _ = roc_curve(labels, scores)
    return brentq(lambda x: 1 - x - interp1d(p_fa, p_hit)(x), 0, 1)


@pytest.mark.parametrize("decimals", [None, 1, 0])
@pytest.mark.parametrize("sizes", [(40, 60), (3, 200), (700, 2000)])
def test_eer_against_scikit_learn(sizes, decimals):
    scores, labels = trial_scores(*sizes, decimals=decimals)
    rate, _ = eer(scores, labels)
    assert rate == pytest.approx(sklearn_eer(scores, labels), abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_eer_against_speechbrain(seed):
    scores, labels = trial_scores(300, 900, seed)
    rate, threshold = eer(scores, labels)
    expected, at = metric_stats.EER(
        torch.tensor(scores[labels]), torch.tensor(scores[~labels])
    )
    # SpeechBrain takes the nearest cut and does not interpolate.
    assert rate == pytest.approx(expected, abs=1e-3)
    assert threshold == pytest.approx(at, abs=0.02)


@settings(deadline=None)
@given(some_trials)
def test_eer_lies_between_the_rates_at_its_threshold(trials):
    scores, labels = columns(trials)
    rate, threshold = eer(scores, labels)
    p_miss = (scores[labels] <= threshold).mean()
    p_fa = (scores[~labels] > threshold).mean()
    assert min(p_miss, p_fa) - 1e-9 <= rate <= max(p_miss, p_fa) + 1e-9
    # No cut has error rates closer to each other.
    for cut in np.unique(scores):
        gap = (scores[labels] <= cut).mean() - (scores[~labels] > cut).mean()
        assert abs(p_miss - p_fa) <= abs(gap) + 1e-9


@settings(deadline=None)
@given(some_trials, st.randoms(use_true_random=False))
def test_eer_knows_ranks_only_and_is_symmetric(trials, random):
    scores, labels = columns(trials)
    rate, _ = eer(scores, labels)
    random.shuffle(trials)
    assert eer(*columns(trials))[0] == pytest.approx(rate)
    assert eer(np.exp(scores), labels)[0] == pytest.approx(rate)
    assert eer(-scores, ~labels)[0] == pytest.approx(rate)
    assert eer(-scores, labels)[0] == pytest.approx(1 - rate)


def slow_min_dcf(scores, labels, p_target, c_miss, c_fa):
    """Every threshold, every trial, one at a time."""
    best = float("inf")
    for threshold in [-np.inf, *scores]:
        misses = false_alarms = 0
        for score, target in zip(scores, labels, strict=True):
            misses += target and score <= threshold
            false_alarms += not target and score > threshold
        cost = c_miss * p_target * misses / sum(labels)
        cost += c_fa * (1 - p_target) * false_alarms / sum(~labels)
        best = min(best, cost)
    return best / min(c_miss * p_target, c_fa * (1 - p_target))


@settings(deadline=None)
@given(
    some_trials,
    st.sampled_from([0.01, 0.05, 0.5, 0.9]),
    st.sampled_from([1.0, 10.0]),
    st.sampled_from([1.0, 5.0]),
)
def test_min_dcf_against_a_double_loop(trials, p_target, c_miss, c_fa):
    scores, labels = columns(trials)
    cost = min_dcf(scores, labels, p_target, c_miss, c_fa)
    expected = slow_min_dcf(scores, labels, p_target, c_miss, c_fa)
    assert cost == pytest.approx(expected)
    assert 0 <= cost <= 1 + 1e-12


@pytest.mark.parametrize("p_target", [0.01, 0.05])
@pytest.mark.parametrize("decimals", [None, 1])
def test_min_dcf_against_speechbrain(p_target, decimals):
    scores, labels = trial_scores(200, 800, decimals=decimals)
    expected, _ = metric_stats.minDCF(
        torch.tensor(scores[labels]),
        torch.tensor(scores[~labels]),
        p_target=p_target,
    )
    # SpeechBrain does not normalise.
    assert min_dcf(scores, labels, p_target) == pytest.approx(
        expected / p_target, abs=1e-5
    )


def test_min_dcf_by_hand():
    # Best at p_target 0.5: reject the lower target, 0.5 * 1/2 over 0.5.
    assert min_dcf([4, 2, 3, 1], [1, 1, 0, 0], 0.5) == 0.5
    # The same cut costs 0.01 / 2 over 0.01; false alarms are never worth it.
    assert min_dcf([4, 2, 3, 1], [1, 1, 0, 0], 0.01) == pytest.approx(0.5)
    assert min_dcf([1, 2, 3, 4], [1, 1, 0, 0], 0.01) == 1.0


@pytest.mark.parametrize("measure", [eer, lambda s, y: min_dcf(s, y, 0.01)])
def test_what_cannot_be_measured(measure):
    with pytest.raises(ValueError, match="1 of 3 scores.*trial 2"):
        measure([0.1, np.nan, 0.3], [True, False, True])
    with pytest.raises(ValueError, match="not finite"):
        measure([0.1, np.inf], [True, False])
    with pytest.raises(ValueError, match="both classes, got 2 target"):
        measure([0.1, 0.2], [True, True])
    with pytest.raises(ValueError, match="both classes, got 0 target"):
        measure([], [])
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        measure([0.1, 0.2], [True, False, True])


# ----------------------------------------------------------------- AS-norm


def by_hand(embeddings, cohort, trials, top):
    """AS-norm in float64, as SpeechBrain's recipe does it, trial by trial."""
    embeddings, cohort = torch.tensor(embeddings), torch.tensor(cohort)
    similarity = torch.nn.CosineSimilarity(dim=-1)
    scores = []
    for sides in zip(trials.enrolment, trials.test):
        enrolment, test = embeddings[list(sides)]
        score, total = similarity(enrolment, test), 0.0
        for side in (enrolment, test):
            best = torch.topk(similarity(side, cohort), k=top)[0]
            total += (score - best.mean()) / best.std()
        scores.append(0.5 * total)
    return np.array(scores)


@pytest.mark.parametrize("top", [2, 30, 199, 200])
def test_as_norm_is_that_of_speechbrains_recipe(top, monkeypatch):
    monkeypatch.setattr(verification, "ROWS", 7)
    monkeypatch.setattr(verification, "COLUMNS", 64)
    rng = np.random.default_rng(top)
    embeddings = rng.normal(size=(40, 24)) * rng.uniform(0.1, 30, (40, 1))
    cohort = rng.normal(size=(200, 24)) * rng.uniform(0.1, 30, (200, 1))
    trials = random_trials(40, 300)
    scores = cosine_scores(embeddings, trials)
    mean, deviation = cohort_statistics(embeddings, cohort, top)
    found = adaptive_s_norm(scores, trials, mean, deviation)
    assert mean.dtype == deviation.dtype == found.dtype == np.float32
    expected = by_hand(embeddings, cohort, trials, top)
    # The deviation of two scores can be anything down to 0.
    np.testing.assert_allclose(
        found, expected, rtol=1e-3 if top == 2 else 1e-4, atol=1e-4
    )


def test_as_norm_lowers_what_is_near_to_everybody():
    trials = Trials(
        np.array([True, True]),
        ["common 1", "common 2", "rare 1", "rare 2"],
        *np.array([[0, 2], [1, 3]]),
    )
    directions = np.eye(16)[[0, 0, 1, 1]]
    rng = np.random.default_rng(0)
    cohort = rng.normal(size=(500, 16)) + directions[0]
    mean, deviation = cohort_statistics(directions, cohort, 50)
    common, rare = adaptive_s_norm([0.8, 0.8], trials, mean, deviation)
    assert common < rare


def test_what_as_norm_cannot_use():
    some = np.eye(3)
    with pytest.raises(ValueError, match="top=4 .* most the 3 utterances"):
        cohort_statistics(some, some, 4)
    with pytest.raises(ValueError, match="top=1 must be at least 2"):
        cohort_statistics(some, some, 1)
    with pytest.raises(ValueError, match=r"\(3, 3\) and \(3, 2\)"):
        cohort_statistics(some, some[:, :2], 2)
    broken = np.where(some > 0, np.nan, 0)[:2]
    with pytest.raises(ValueError, match="2 of 2 .*cohort.* in row 0"):
        cohort_statistics(some, broken, 2)

    trials = Trials(
        np.array([True, False]), ["a", "b", "c"], *np.array([[0, 0], [1, 2]])
    )
    ones = np.ones(3)
    with pytest.raises(ValueError, match=r"got shapes \(2,\), \(2,\)"):
        adaptive_s_norm([0.1, 0.2], trials, ones[:2], ones)
    with pytest.raises(ValueError, match="1 of 3 .* the first c"):
        adaptive_s_norm([0.1, 0.2], trials, ones, np.array([1, 1, 0]))


# --------------------------------------------------------------- bootstrap


def spoken_trials(n_speakers, per_speaker, seed=0, effect=1.0):
    """All trials over some speakers, each easier or harder than another."""
    rng = np.random.default_rng(seed)
    speakers = np.repeat(np.arange(n_speakers), per_speaker)
    first, second = np.triu_indices(len(speakers), 1)
    names = [f"{n:04d}" for n in range(len(speakers))]
    labels = speakers[first] == speakers[second]
    trials = Trials(labels, names, first, second)
    ease = effect * rng.normal(size=(2, n_speakers))
    scores = rng.normal(3.0 * labels)
    scores += np.where(
        labels,
        ease[0, speakers[first]],
        ease[1, speakers[first]] + ease[1, speakers[second]],
    )
    return scores, trials, speakers


@pytest.mark.parametrize("decimals", [0, 9])
def test_bootstrap_is_the_eer_of_trials_repeated(decimals):
    scores, trials, speakers = spoken_trials(6, 4)
    scores = scores.round(decimals)
    found = bootstrap_eer(scores, trials, 40, level=0.8, seed=3)
    rng = np.random.default_rng(3)
    rates = []
    while len(rates) < 40:
        drawn = rng.integers(6, size=6).tolist()
        if len(set(drawn)) == 1:
            continue  # no trial between speakers
        chosen = []
        for trial in range(len(trials)):
            one = speakers[trials.enrolment[trial]]
            other = speakers[trials.test[trial]]
            times = drawn.count(one)
            if one != other:
                times *= drawn.count(other)
            chosen += times * [trial]
        rates.append(eer(scores[chosen], trials.labels[chosen])[0])
    assert found == pytest.approx(tuple(np.quantile(rates, [0.1, 0.9])))


def test_bootstrap_is_as_wide_as_new_speakers_are():
    def rate(seed):
        scores, trials, _ = spoken_trials(25, 4, seed)
        return eer(scores, trials.labels)[0]

    spread = np.std([rate(seed) for seed in range(1, 120)])
    widths = []
    for seed in range(12):
        scores, trials, _ = spoken_trials(25, 4, seed)
        low, high = bootstrap_eer(scores, trials, 150, level=0.6827)
        widths.append((high - low) / 2)
    # Drawing trials instead would give a third of it.
    assert 0.75 < np.mean(widths) / spread < 1.33


def test_bootstrap_is_seeded_and_follows_the_level():
    scores, trials, _ = spoken_trials(10, 4)
    first = bootstrap_eer(scores, trials, 100, seed=1)
    assert first == bootstrap_eer(scores, trials, 100, seed=1)
    assert first != bootstrap_eer(scores, trials, 100, seed=2)
    low, high = bootstrap_eer(scores, trials, 100, level=0.5, seed=1)
    assert first[0] < low < high < first[1]


def test_what_bootstrap_cannot_use():
    scores, trials, _ = spoken_trials(4, 3)
    with pytest.raises(ValueError, match="level must be .* got 95"):
        bootstrap_eer(scores, trials, level=95)
    with pytest.raises(ValueError, match="one value per trial"):
        bootstrap_eer(scores[1:], trials)
    alone = Trials(
        np.array([True, True, False]),
        ["a", "b", "c"],
        *np.array([[0, 1, 0], [1, 2, 2]]),
    )
    with pytest.raises(ValueError, match="a single speaker"):
        bootstrap_eer([1.0, 2.0, 3.0], alone)


@pytest.mark.parametrize("prior", [0, 1, -0.1, float("nan")])
def test_prior_out_of_range(prior):
    with pytest.raises(ValueError, match="p_target"):
        min_dcf([0.1, 0.2], [True, False], prior)


def test_verify_puts_it_together():
    trials = random_trials(40, 400)
    embeddings = np.random.default_rng(3).normal(size=(40, 16))
    scores = cosine_scores(embeddings, trials)
    figures = verify(embeddings, trials)
    rate, threshold = eer(scores, trials.labels)
    assert figures == {
        "eer": 100 * rate,
        "min_dcf_001": min_dcf(scores, trials.labels, 0.01),
        "min_dcf_005": min_dcf(scores, trials.labels, 0.05),
        "threshold": threshold,
    }
    assert 30 < figures["eer"] < 70  # random labels
    # Checkpoint metadata and JSON take plain numbers only.
    assert {type(value) for value in figures.values()} == {float}
