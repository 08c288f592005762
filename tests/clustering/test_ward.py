"""Ward's method against scipy."""

import numpy as np
import pytest
import torch
from blobs import blobs, unit, ward_by_scipy
from devices import ON_GPU
from hypothesis import given, settings, strategies as st
from scipy.cluster.hierarchy import linkage
from sklearn.metrics import adjusted_rand_score

from lgl_plugin.clustering import ward as ward_module
from lgl_plugin.clustering.ward import ward


@st.composite
def weighted_points(draw):
    """Points in general position, weights and a number of clusters."""
    n = draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    points = rng.normal(size=(n, draw(st.integers(1, 5))))
    weights = rng.integers(1, draw(st.integers(2, 30)), size=n)
    return points, weights, draw(st.integers(1, n))


@given(weighted_points())
@settings(max_examples=150, deadline=None)
def test_partition_is_that_of_scipy_with_points_repeated(case):
    points, weights, n_clusters = case
    tree = ward(torch.from_numpy(points), torch.from_numpy(weights))
    found = tree.cut(n_clusters)
    assert sorted(set(found.tolist())) == list(range(n_clusters))
    if weights.sum() > 1:
        repeated = ward_by_scipy(points.repeat(weights, axis=0), n_clusters)
        ours = found.repeat(weights)
        assert adjusted_rand_score(ours, repeated) == 1


@pytest.mark.parametrize("n_clusters", [1, 2, 30, 300, 599, 600])
def test_partition_is_that_of_scipy(n_clusters, monkeypatch):
    monkeypatch.setitem(ward_module.DISTANCES, "cpu", 8 * 600 * 7)
    points = unit(blobs(30, 20, spread=0.3)[0])
    given_points, weights = torch.from_numpy(points), torch.ones(600)
    tree = ward(given_points, weights)
    found = tree.cut(n_clusters)
    assert adjusted_rand_score(found, ward_by_scipy(points, n_clusters)) == 1
    # scipy's heights are sqrt(2 * rise).
    heights = linkage(points, "ward")[:, 2]
    np.testing.assert_allclose(tree.rises, heights**2 / 2, rtol=1e-5)
    assert tree.within()[-1] == 0 and len(tree.within()) == 600
    # The caller's are left as they were.
    assert (given_points.numpy() == points).all()
    assert (weights == 1).all()


def test_a_chain_in_which_only_the_ends_are_mutual():
    # Each one's neighbour is the one before it: a join a round.
    points = torch.cumsum(1.3 ** torch.arange(30, dtype=torch.float64), 0)
    found = ward(points[:, None], torch.ones(30)).cut(4)
    assert adjusted_rand_score(found, ward_by_scipy(points[:, None], 4)) == 1


def test_equal_points_are_joined_first():
    points = torch.eye(3).repeat_interleave(40, dim=0)
    found = ward(points, torch.ones(120)).cut(3)
    assert adjusted_rand_score(found, np.arange(120) // 40) == 1


@ON_GPU
def test_gpu_finds_what_the_cpu_finds():
    points = torch.from_numpy(unit(blobs(30, 20, spread=0.3)[0]))
    weights = torch.ones(600)
    gpu = ward(points.cuda(), weights.cuda()).cut(30)
    assert adjusted_rand_score(gpu, ward(points, weights).cut(30)) == 1
