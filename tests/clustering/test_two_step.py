"""Ward's method against scipy; two-step clustering."""

import numpy as np
import pytest
import torch
from blobs import blobs, unit
from hypothesis import given, settings, strategies as st
from scipy.cluster.hierarchy import fcluster, linkage
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from lgl_plugin.clustering import two_step
from lgl_plugin.clustering.kmeans import FaissKMeans, TorchKMeans
from lgl_plugin.clustering.two_step import TwoStepKMeans, ward


def by_scipy(points, n_clusters):
    return fcluster(linkage(points, "ward"), n_clusters, "maxclust")


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
    found = ward(
        torch.from_numpy(points), torch.from_numpy(weights), n_clusters
    )
    assert sorted(set(found.tolist())) == list(range(n_clusters))
    if weights.sum() > 1:
        repeated = by_scipy(points.repeat(weights, axis=0), n_clusters)
        ours = found.numpy().repeat(weights)
        assert adjusted_rand_score(ours, repeated) == 1


@pytest.mark.parametrize("n_clusters", [1, 2, 30, 300, 599, 600])
def test_partition_is_that_of_scipy(n_clusters, monkeypatch):
    monkeypatch.setitem(two_step.DISTANCES, "cpu", 8 * 600 * 7)
    points = unit(blobs(30, 20, spread=0.3)[0])
    given_points, weights = torch.from_numpy(points), torch.ones(600)
    found = ward(given_points, weights, n_clusters)
    assert adjusted_rand_score(found, by_scipy(points, n_clusters)) == 1
    # The caller's are left as they were.
    assert (given_points.numpy() == points).all()
    assert (weights == 1).all()


def test_a_chain_in_which_only_the_ends_are_mutual():
    # Each one's neighbour is the one before it: a join a round.
    points = torch.cumsum(1.3 ** torch.arange(30, dtype=torch.float64), 0)
    found = ward(points[:, None], torch.ones(30), 4)
    assert adjusted_rand_score(found, by_scipy(points[:, None], 4)) == 1


def test_equal_points_are_joined_first():
    points = torch.eye(3).repeat_interleave(40, dim=0)
    found = ward(points, torch.ones(120), 3)
    assert adjusted_rand_score(found, np.arange(120) // 40) == 1


@pytest.mark.parametrize("backend", [FaissKMeans, TorchKMeans])
def test_two_steps(backend):
    points, speakers = blobs(spread=0.05)
    cluster = TwoStepKMeans(backend(100), 20)
    found = cluster(points)
    assert normalized_mutual_info_score(speakers, found.labels) > 0.999
    assert found.labels.dtype == np.int64
    assert found.centroids.dtype == np.float32
    assert (found.n_clusters, found.n_empty) == (20, 0)
    assert found.points_used == 800
    means = [unit(points)[found.labels == k].mean(axis=0) for k in range(20)]
    np.testing.assert_allclose(
        found.centroids, unit(np.array(means)), atol=1e-5
    )


def test_second_step_joins_whole_clusters_of_the_first(monkeypatch):
    monkeypatch.setattr(two_step, "CHUNK", 100)
    points, _ = blobs(spread=0.3)
    first = TorchKMeans(100)(points)
    labels = TwoStepKMeans(TorchKMeans(100), 20)(points).labels
    expected = by_scipy(
        np.array([unit(points)[first.labels == k].mean(0) for k in range(100)])[
            first.labels
        ],
        20,
    )
    assert adjusted_rand_score(labels, expected) == 1


def test_fewer_distinct_points_than_clusters():
    points = np.repeat(np.eye(4, dtype=np.float32), 5, axis=0)
    found = TwoStepKMeans(TorchKMeans(8), 6)(points)
    assert (found.n_clusters, found.n_empty) == (4, 2)
    assert sorted(np.bincount(found.labels)) == [5, 5, 5, 5]


@pytest.mark.parametrize("n_clusters", [0, 101])
def test_numbers_of_clusters_out_of_range_are_an_error(n_clusters):
    with pytest.raises(ValueError, match="from 1 to the 100 of the first"):
        TwoStepKMeans(TorchKMeans(100), n_clusters)


def test_more_clusters_than_utterances_is_an_error_before_any_work():
    with pytest.raises(ValueError, match="n_clusters=100 is more than the 99"):
        TwoStepKMeans(TorchKMeans(100), 10).check(99)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_finds_what_the_cpu_finds():
    points = torch.from_numpy(unit(blobs(30, 20, spread=0.3)[0]))
    weights = torch.ones(600)
    gpu = ward(points.cuda(), weights.cuda(), 30).cpu()
    assert adjusted_rand_score(gpu, ward(points, weights, 30)) == 1
