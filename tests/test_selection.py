"""Label-free choice of an epoch."""

import numpy as np
import pytest
from sklearn.metrics import roc_curve

from lgl_plugin.selection import CRITERIA, check_criterion, pseudo_trial_eer


def test_equal_error_rate_of_all_pairs():
    rng = np.random.default_rng(0)
    voices = rng.normal(size=(40, 6))
    first, second = voices + rng.normal(size=(2, 40, 6))
    scores, same = [], []
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            scores.append(a @ b / np.sqrt((a @ a) * (b @ b)))
            same.append(i == j)
    p_fa, p_hit, _ = roc_curve(same, scores, drop_intermediate=False)
    p_miss = 1 - p_hit
    at = np.argmin(np.abs(p_fa - p_miss))
    expected = (p_fa[at] + p_miss[at]) / 2
    found = pseudo_trial_eer(first, second)
    assert found == pytest.approx(expected, abs=1 / 40)
    assert 0.1 < found < 0.4


def test_loudness_of_embeddings_does_not_matter():
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(2, 30, 5)) + rng.normal(size=(30, 5))
    scaled = first * rng.uniform(0.1, 10, (30, 1))
    expected = pseudo_trial_eer(first, second)
    assert pseudo_trial_eer(scaled, 3 * second) == pytest.approx(expected)


def test_better_embeddings_have_a_lower_error():
    rng = np.random.default_rng(2)
    voices = rng.normal(size=(100, 8))
    rates = [
        pseudo_trial_eer(*(voices + level * rng.normal(size=(2, 100, 8))))
        for level in (0.2, 1.0, 5.0)
    ]
    assert rates == sorted(rates) and rates[0] < 0.02 and rates[2] > 0.4


def test_opposite_embeddings_are_always_wrong():
    assert pseudo_trial_eer(np.eye(4), -np.eye(4)) == 1.0


def test_criteria():
    for name in CRITERIA:
        check_criterion(name)
    for name in ("", "EER", None, "pseudo-trials"):
        with pytest.raises(ValueError, match="selection: .* is not known"):
            check_criterion(name)
