"""Two-step clustering against scipy's Ward and known speakers."""

import functools

import numpy as np
import pytest
from blobs import blobs, unit, ward_by_scipy
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from lgl_plugin.clustering import vectors
from lgl_plugin.clustering.average import AverageLinkage
from lgl_plugin.clustering.kmeans import FaissKMeans, TorchKMeans
from lgl_plugin.clustering.two_step import TwoStepKMeans


@pytest.mark.parametrize("backend", [FaissKMeans, TorchKMeans])
def test_two_steps(backend):
    points, speakers = blobs(spread=0.05)
    cluster = TwoStepKMeans(backend(100), 20)
    found = cluster(points)
    assert normalized_mutual_info_score(speakers, found.labels) > 0.999
    assert found.labels.dtype == np.int64
    assert found.centroids.dtype == np.float32
    assert found.n_clusters == 20
    assert found.points_used == 800
    assert found.inertia == pytest.approx(
        sum(
            np.square(part - part.mean(0)).sum()
            for part in (unit(points)[found.labels == k] for k in range(20))
        ),
        abs=1e-2,
    )
    means = [unit(points)[found.labels == k].mean(axis=0) for k in range(20)]
    np.testing.assert_allclose(
        found.centroids, unit(np.array(means)), atol=1e-5
    )


def test_second_step_joins_whole_clusters_of_the_first(monkeypatch):
    monkeypatch.setattr(vectors, "CHUNK", 100)
    points, _ = blobs(spread=0.3)
    first = TorchKMeans(100)(points)
    labels = TwoStepKMeans(TorchKMeans(100), 20)(points).labels
    expected = ward_by_scipy(
        np.array([unit(points)[first.labels == k].mean(0) for k in range(100)])[
            first.labels
        ],
        20,
    )
    assert adjusted_rand_score(labels, expected) == 1


def test_fewer_distinct_points_than_clusters():
    points = np.repeat(np.eye(4, dtype=np.float32), 5, axis=0)
    found = TwoStepKMeans(TorchKMeans(8), 6)(points)
    assert found.n_clusters == 4
    assert sorted(np.bincount(found.labels)) == [5, 5, 5, 5]


def test_few_utterances_are_joined_without_a_first_step():
    points, _ = blobs(spread=0.3)
    labels = TwoStepKMeans(TorchKMeans(800), 20)(points).labels
    assert adjusted_rand_score(labels, ward_by_scipy(unit(points), 20)) == 1


def test_an_estimated_number():
    points, speakers = blobs(30, 20, spread=0.05, dimensions=32)
    cluster = TwoStepKMeans(TorchKMeans(50_000), "auto")
    found = cluster(points)
    assert found.n_clusters == 30
    assert adjusted_rand_score(speakers, found.labels) == 1


@pytest.mark.parametrize("n_clusters", [0, 2.5, 101, "many"])
def test_numbers_of_clusters_out_of_range_are_an_error(n_clusters):
    with pytest.raises(ValueError, match="from 1 to the 100 of the first"):
        TwoStepKMeans(TorchKMeans(100), n_clusters)


@pytest.mark.parametrize("cluster", [TwoStepKMeans, AverageLinkage])
def test_a_first_step_that_is_none(cluster):
    """As a yaml's `!name:` gives one, and `lgl train` clusters after hours."""
    first = functools.partial(TorchKMeans, 100)
    with pytest.raises(ValueError, match="kmeans must be .* made by !new:"):
        cluster(first, 0.5)


def test_more_clusters_than_utterances_is_an_error_before_any_work():
    with pytest.raises(ValueError, match="n_clusters=100 is more than the 99"):
        TwoStepKMeans(TorchKMeans(200), 100).check(99)
    with pytest.raises(ValueError, match="too few to estimate"):
        TwoStepKMeans(TorchKMeans(200), "auto").check(7)
    TwoStepKMeans(TorchKMeans(200), 99).check(99)


def test_kmeans_alone_takes_no_estimate():
    with pytest.raises(ValueError, match="auto is for TwoStepKMeans"):
        TorchKMeans("auto")
