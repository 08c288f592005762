"""Average linkage against scikit-learn's, which keeps all pairs."""

import numpy as np
import pytest
from blobs import blobs, unit
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import adjusted_rand_score

from lgl_plugin.clustering.average import AverageLinkage, average_linkage
from lgl_plugin.clustering.kmeans import TorchKMeans


@pytest.mark.parametrize("threshold", [-1.0, 0.2, 0.5, 0.8, 0.99])
def test_same_clusters_as_one_join_at_a_time(threshold):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(12, 8))
    points = np.repeat(centres, 25, axis=0) + 0.7 * rng.normal(size=(300, 8))
    points = points.astype(np.float32)
    labels = average_linkage(points, threshold)
    expected = AgglomerativeClustering(
        n_clusters=None,
        metric="cosine",
        linkage="average",
        distance_threshold=1 - threshold + 1e-6,
    ).fit_predict(points)
    assert adjusted_rand_score(labels, expected) == 1.0
    sizes = np.bincount(labels)
    assert sizes.min() > 0 and (np.diff(sizes) <= 0).all()


def test_copies_are_one_cluster():
    """Equal cosines everywhere: a circle of neighbours must not be endless."""
    points = np.repeat(np.eye(3, dtype=np.float32), 40, axis=0)
    labels = average_linkage(points, 0.9)
    assert np.bincount(labels).tolist() == [40, 40, 40]
    assert len({*labels[:40]}) == len({*labels[40:80]}) == 1


def test_a_single_embedding():
    assert average_linkage(np.ones((1, 4), np.float32), 0.5).tolist() == [0]


def test_for_the_yaml():
    points, speakers = blobs(spread=0.05, dimensions=32)
    found = AverageLinkage(TorchKMeans(50_000), 0.5)(points)
    assert (found.labels == average_linkage(points, 0.5)).all()
    assert adjusted_rand_score(speakers, found.labels) == 1
    means = [unit(points)[found.labels == k].mean(axis=0) for k in range(20)]
    np.testing.assert_allclose(
        found.centroids, unit(np.array(means)), atol=1e-5
    )


def test_members_of_the_first_step_count():
    """As pairs do: against the average cosine of all pairs of the result."""
    points, _ = blobs(6, 200, spread=0.5)
    found = AverageLinkage(TorchKMeans(40), 0.2)(points)
    cosines = unit(points) @ unit(points).T
    member = np.eye(found.n_clusters)[found.labels]
    sizes = member.sum(axis=0)
    between = member.T @ cosines @ member / np.outer(sizes, sizes)
    np.fill_diagonal(between, -1)
    assert 1 < found.n_clusters < 40 and between.max() < 0.2
    assert (np.diff(sizes) <= 0).all()


@pytest.mark.parametrize("threshold", [-1, 1.5])
def test_a_threshold_is_a_cosine(threshold):
    with pytest.raises(ValueError, match="a cosine between"):
        AverageLinkage(TorchKMeans(9), threshold)
