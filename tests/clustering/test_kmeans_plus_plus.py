"""First centroids against brute force and scikit-learn."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.cluster import kmeans_plusplus

from lgl_plugin.clustering import kmeans_plus_plus as module
from lgl_plugin.clustering.kmeans_plus_plus import draw, kmeans_plus_plus


def directions(n=600, dimensions=8, seed=0):
    points = np.random.default_rng(seed).normal(size=(n, dimensions))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    return torch.from_numpy(points.astype(np.float32))


def step_by_step(points, n_clusters, seed):
    """The same rounds, with all gains computed anew after each seed."""
    generator = torch.Generator().manual_seed(seed)
    seeds = [int(torch.randint(len(points), (1,), generator=generator))]
    while len(seeds) < n_clusters:
        nearest = (points @ points[seeds].T).amax(dim=1)
        candidates = draw(1 - nearest, module.CANDIDATES, generator)
        for _ in range(min(module.KEPT, n_clusters - len(seeds))):
            nearest = (points @ points[seeds].T).double().amax(dim=1)
            cosines = (points @ points[candidates].T).double()
            gains = (cosines - nearest[:, None]).clamp(min=0).sum(dim=0)
            seeds.append(int(candidates[gains.argmax()]))
    return seeds


@pytest.mark.parametrize("seed", range(3))
def test_gains_brought_up_to_date_are_those_computed_anew(seed, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 100)
    points = directions(seed=seed)
    found = kmeans_plus_plus(points, 100, seed)
    assert found.tolist() == step_by_step(points, 100, seed)


@given(st.integers(1, 200), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_fewer_seeds_are_the_first_of_more(n_clusters, seed):
    points = directions(200)
    more = kmeans_plus_plus(points, 200, seed)
    assert sorted(more.tolist()) == list(range(200))
    fewer = kmeans_plus_plus(points, n_clusters, seed)
    assert fewer.tolist() == more[:n_clusters].tolist()


def test_another_seed_gives_other_rows():
    points = directions()
    one, other = (set(kmeans_plus_plus(points, 50, s).tolist()) for s in (1, 2))
    assert len(one - other) > 10


def test_each_distinct_point_is_taken_before_any_twice():
    points = directions(40).repeat_interleave(7, dim=0)
    found = kmeans_plus_plus(points, 60, seed=0)
    assert len((found[:40] // 7).unique()) == 40


@pytest.mark.parametrize("spread", [0.1, 0.3, 0.6])
def test_inertia_is_no_higher_than_that_of_scikit_learn(spread):
    rng = np.random.default_rng(0)
    points = directions(100, 16).repeat_interleave(10, dim=0)
    points += spread * torch.from_numpy(rng.normal(size=points.shape)).float()
    points /= points.norm(dim=1, keepdim=True)

    def inertia(centroids):
        return float((2 - 2 * (points @ centroids.T).amax(dim=1)).sum())

    seeds = range(5)
    ours = [inertia(points[kmeans_plus_plus(points, 100, s)]) for s in seeds]
    theirs = [
        inertia(
            torch.from_numpy(
                kmeans_plusplus(points.numpy(), 100, random_state=s)[0]
            )
        )
        for s in seeds
    ]
    assert np.mean(ours) < np.mean(theirs)


def test_rows_are_drawn_in_proportion_to_their_weights():
    weights = torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0, 0.0])
    found = draw(weights, 40_000, torch.Generator().manual_seed(0))
    shares = torch.bincount(found, minlength=6) / 40_000
    # Five standard deviations of the share that is most uncertain.
    torch.testing.assert_close(shares, weights / 4, atol=0.0125, rtol=0)
    assert shares[weights == 0].sum() == 0


def test_no_weight_left_gives_the_last_row():
    assert draw(torch.zeros(5), 2, torch.Generator()).tolist() == [4, 4]
