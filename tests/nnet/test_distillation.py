"""Losses of self-distillation against values by hand and slow references."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from lgl_plugin.nnet.distillation import (
    cross_entropy,
    dimension_regularisation,
    dino_loss,
    entropy,
    koleo,
    mean_entropy_gap,
    off_diagonal_regularisation,
    sinkhorn,
)


def softmax(logits):
    """In float64, row by row."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 999), st.sampled_from([0.03, 0.1, 1.0]))
def test_dino_pairs_each_view_with_the_other_global_views(seed, temperature):
    logits = draw(4, 3, 5, seed=seed)
    targets = draw(2, 3, 5, seed=seed + 1).softmax(-1)
    p, q = targets.double().numpy(), logits.double().numpy() / temperature
    terms = [
        -(p[g, b] * np.log(softmax(q[v, b]))).sum()
        for g in range(2)
        for v in range(4)
        for b in range(3)
        if v != g
    ]
    found = dino_loss(targets, logits, temperature).item()
    assert found == pytest.approx(np.mean(terms), rel=1e-4)


def test_cross_entropy_is_the_mean_over_views_and_utterances():
    logits, targets = draw(4, 3, 5), draw(3, 5, seed=1).softmax(-1)
    logs = np.log(softmax(logits.double().numpy() / 0.1))
    expected = -(targets.double().numpy() * logs).sum(-1).mean()
    found = cross_entropy(targets, logits, 0.1).item()
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("n_prototypes", [5, 20])
def test_sinkhorn_gives_rows_of_one_and_even_columns(n_prototypes):
    shares = sinkhorn(draw(100, n_prototypes).mul(2).softmax(-1))
    torch.testing.assert_close(shares.sum(1), torch.ones(100))
    mass = shares.sum(0) * n_prototypes / 100
    assert (mass - 1).abs().max() < 0.03


def test_sinkhorn_in_full_is_scaling_by_rows_and_columns():
    """Its limit is the one doubly scaled matrix: cross-ratios stay."""
    given_ = draw(4, 3).double().softmax(-1)
    found = sinkhorn(given_, n_iterations=200).double()

    def ratio(x):
        return x[0, 0] * x[1, 1] / (x[0, 1] * x[1, 0])

    assert ratio(found).item() == pytest.approx(ratio(given_).item(), rel=1e-4)
    torch.testing.assert_close(
        found.sum(0), torch.full((3,), 4 / 3).double(), atol=1e-4, rtol=0
    )


def test_a_queue_shares_the_prototypes_and_its_empty_places_do_not_count():
    batch, others = draw(4, 6).softmax(-1), draw(20, 6, seed=1).softmax(-1)
    both = sinkhorn(torch.cat([batch, others]))
    empty = torch.cat([others, torch.zeros(7, 6)])
    torch.testing.assert_close(sinkhorn(batch, empty), both[:4])


def test_me_max_by_hand():
    uniform = torch.full((2, 3, 8), 1 / 8)
    assert mean_entropy_gap(uniform).item() == pytest.approx(0, abs=1e-6)
    one_hot = torch.eye(8)[torch.zeros(5, dtype=int)]
    assert mean_entropy_gap(one_hot).item() == pytest.approx(math.log(8))
    assert entropy(torch.eye(3)).tolist() == [0, 0, 0]


def test_a_prototype_that_nothing_is_near_keeps_the_gradient_finite():
    """At a low temperature its probability is 0 in float32."""
    cosines = torch.tensor([[1.0, -0.9], [0.95, -0.8]], requires_grad=True)
    mean_entropy_gap((cosines / 0.01).softmax(1)).backward()
    assert cosines.grad.isfinite().all()


def test_koleo_by_hand_and_by_a_loop():
    points = draw(20, 7)
    units = points.double().numpy()
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    nearest = [
        min(np.linalg.norm(a - b) for j, b in enumerate(units) if j != i)
        for i, a in enumerate(units)
    ]
    expected = -np.log(nearest).mean()
    assert koleo(points).item() == pytest.approx(expected, rel=1e-4)
    antipodes = torch.tensor([[2.0, 0.0], [-3.0, 0.0]])
    assert koleo(antipodes).item() == pytest.approx(-math.log(2), abs=1e-6)


def test_koleo_of_equal_points_has_a_finite_gradient():
    points = torch.ones(3, 4, requires_grad=True)
    koleo(points).backward()
    assert points.grad.isfinite().all()


def test_dimension_regularisation_between_its_bounds():
    dim = 64
    independent = torch.linalg.qr(draw(200, dim))[0]
    found = dimension_regularisation(independent).item()
    assert found == pytest.approx(0.5 * math.log(dim), abs=1e-4)
    rank_one = draw(200, 1) * draw(1, dim, seed=1)
    found = dimension_regularisation(rank_one).item()
    assert found == pytest.approx(math.log(dim), abs=1e-4)


def test_off_diagonal_regularisation_by_loops():
    vectors = draw(9, 4)
    columns = vectors.double().numpy().T
    expected = sum(
        (a @ b) ** 2 / (a @ a) / (b @ b)
        for i, a in enumerate(columns)
        for j, b in enumerate(columns)
        if i != j
    )
    found = off_diagonal_regularisation(vectors).item()
    assert found == pytest.approx(expected / 4, rel=1e-5)
