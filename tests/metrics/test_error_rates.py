"""Error rates and detection costs against slow independent versions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from sklearn.metrics import roc_curve
from speechbrain.utils import metric_stats

from lgl_plugin.metrics.error_rates import eer, min_dcf, operating_points


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


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(allow_nan=False, allow_infinity=False), st.booleans()
        ),
        min_size=2,
        max_size=20,
    ).filter(lambda trials: len({label for _, label in trials}) == 2),
    st.integers(0, 3),
)
def test_cuts_part_any_two_scores(trials, n_neighbours):
    """Neighbours in float64, denormals and the ends of its range, too."""
    scores, labels = columns(trials)
    near = scores[0]
    for _ in range(n_neighbours):
        near = np.nextafter(near, 0.0)
        scores, labels = np.append(scores, near), np.append(labels, True)
    cuts, p_miss, p_fa = operating_points(scores, labels)
    assert (np.diff(cuts) >= 0).all()
    for cut, miss, false_alarm in zip(cuts, p_miss, p_fa):
        assert miss == pytest.approx((scores[labels] <= cut).mean())
        assert false_alarm == pytest.approx((scores[~labels] > cut).mean())
    assert 0 <= eer(scores, labels)[0] <= 1


def slow_min_dcf(scores, labels, p_target):
    """Every threshold, every trial, one at a time."""
    best = float("inf")
    for threshold in [-np.inf, *scores]:
        misses = false_alarms = 0
        for score, target in zip(scores, labels, strict=True):
            misses += target and score <= threshold
            false_alarms += not target and score > threshold
        cost = p_target * misses / sum(labels)
        cost += (1 - p_target) * false_alarms / sum(~labels)
        best = min(best, cost)
    return best / min(p_target, 1 - p_target)


@settings(deadline=None)
@given(some_trials, st.sampled_from([0.01, 0.05, 0.5, 0.9]))
def test_min_dcf_against_a_double_loop(trials, p_target):
    scores, labels = columns(trials)
    cost = min_dcf(scores, labels, p_target)
    expected = slow_min_dcf(scores, labels, p_target)
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


@pytest.mark.parametrize("prior", [0, 1, -0.1, float("nan")])
def test_prior_out_of_range(prior):
    with pytest.raises(ValueError, match="p_target"):
        min_dcf([0.1, 0.2], [True, False], prior)
