"""Average linkage against scikit-learn's, which keeps all pairs."""

import numpy as np
import pytest
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import adjusted_rand_score

from lgl_plugin.clustering.average import average_linkage


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
