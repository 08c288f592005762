"""Losses without negatives, against numpy in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from lgl_plugin.nnet.redundancy import (
    barlow_twins_loss,
    negative_cosine,
    spread_terms,
    vicreg_terms,
)


def draw(seed, n=9, dim=4):
    rng = np.random.default_rng(seed)
    views = rng.normal(0.5, 0.7, (2, n, dim))
    return views, torch.from_numpy(views)


def spread(view):
    """Variance and covariance of one view, by loops."""
    covariance = np.cov(view.T)
    deviations = np.sqrt(np.diag(covariance) + 1e-4)
    variance = np.mean([max(0, 1 - d) for d in deviations])
    dim = len(covariance)
    pairs = [(i, j) for i in range(dim) for j in range(dim) if i != j]
    return variance, sum(covariance[pair] ** 2 for pair in pairs) / dim


@given(st.integers(0, 999))
def test_vicreg(seed):
    views, tensors = draw(seed)
    found = [term.item() for term in vicreg_terms(*tensors)]
    own = np.array([spread(view) for view in views])
    expected = [np.square(views[0] - views[1]).mean(), *own.sum(0)]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    alone = [term.item() for term in spread_terms(tensors[0])]
    assert alone == pytest.approx(own[0], rel=1e-4, abs=1e-6)


@given(st.integers(0, 999))
def test_barlow_twins(seed):
    views, tensors = draw(seed)
    found = barlow_twins_loss(*tensors, redundancy=0.1).item()
    a, b = ((v - v.mean(0)) / np.sqrt(v.var(0) + 1e-5) for v in views)
    correlation = a.T @ b / len(a)
    expected = 0
    for i, row in enumerate(correlation):
        for j, value in enumerate(row):
            expected += (1 - value) ** 2 if i == j else 0.1 * value**2
    assert found == pytest.approx(expected, rel=1e-4)


def test_negative_cosine_stops_the_targets_gradient():
    predicted = torch.randn(5, 3, requires_grad=True)
    target = torch.randn(5, 3, requires_grad=True)
    loss = negative_cosine(predicted, target)
    loss.backward()
    assert target.grad is None and predicted.grad.abs().sum() > 0
    p, t = (x.detach().double().numpy() for x in (predicted, target))
    lengths = np.linalg.norm(p, axis=1) * np.linalg.norm(t, axis=1)
    expected = -((p * t).sum(1) / lengths).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", [vicreg_terms, barlow_twins_loss])
def test_a_collapsed_batch_has_a_finite_gradient(loss):
    views = torch.ones(2, 6, 3, requires_grad=True)
    found = loss(*views)
    (sum(found) if isinstance(found, tuple) else found).backward()
    assert views.grad.isfinite().all()
