"""Scores, AS-norm and bootstrap against slow independent versions."""

import numpy as np
import pytest
import torch

from lgl_plugin.dataio.trials import Trials
from lgl_plugin.evaluation import verification
from lgl_plugin.evaluation.verification import (
    adaptive_s_norm,
    bootstrap_eer,
    cohort_statistics,
    cosine_scores,
    figures_of,
    write_scores,
)
from lgl_plugin.metrics.error_rates import eer, min_dcf

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
    found = bootstrap_eer(scores, trials, 40, seed=3)
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
    assert found == pytest.approx(tuple(np.quantile(rates, [0.025, 0.975])))


def test_bootstrap_is_as_wide_as_new_speakers_are():
    def rate(seed):
        scores, trials, _ = spoken_trials(25, 4, seed)
        return eer(scores, trials.labels)[0]

    spread = np.std([rate(seed) for seed in range(1, 120)])
    widths = []
    for seed in range(12):
        scores, trials, _ = spoken_trials(25, 4, seed)
        low, high = bootstrap_eer(scores, trials, 150)
        widths.append((high - low) / (2 * 1.96))
    # Drawing trials instead would give a third of it.
    assert 0.75 < np.mean(widths) / spread < 1.33


def test_bootstrap_is_seeded():
    scores, trials, _ = spoken_trials(10, 4)
    first = bootstrap_eer(scores, trials, 100, seed=1)
    assert first == bootstrap_eer(scores, trials, 100, seed=1)
    assert first != bootstrap_eer(scores, trials, 100, seed=2)


def test_what_bootstrap_cannot_use():
    scores, trials, _ = spoken_trials(4, 3)
    with pytest.raises(ValueError, match="one value per trial"):
        bootstrap_eer(scores[1:], trials)
    alone = Trials(
        np.array([True, True, False]),
        ["a", "b", "c"],
        *np.array([[0, 1, 0], [1, 2, 2]]),
    )
    with pytest.raises(ValueError, match="fewer than three speakers"):
        bootstrap_eer([1.0, 2.0, 3.0], alone)


def test_lists_are_as_good_as_arrays():
    trials = random_trials(40, 30)
    rows = np.random.default_rng(3).normal(size=(40, 16)).tolist()
    scores = cosine_scores(rows, trials)
    mean, deviation = cohort_statistics(rows, rows[:20], top=5)
    normed = adaptive_s_norm(scores, trials, mean, deviation)
    again = adaptive_s_norm(
        scores.tolist(), trials, mean.tolist(), deviation.tolist()
    )
    assert (again == normed).all()
    ends = bootstrap_eer(scores, trials, 20)
    assert bootstrap_eer(scores.tolist(), trials, 20) == ends
    with pytest.raises(ValueError, match="n_resamples must be .* got 0"):
        bootstrap_eer(scores, trials, 0)


def test_figures_are_those_of_the_measures():
    trials = random_trials(40, 400)
    embeddings = np.random.default_rng(3).normal(size=(40, 16))
    scores = cosine_scores(embeddings, trials)
    figures = figures_of(scores, trials)
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
