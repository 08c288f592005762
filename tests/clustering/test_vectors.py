"""Views of the same utterances, joined."""

import numpy as np
import pytest
from blobs import unit

from lgl_plugin.clustering import vectors
from lgl_plugin.clustering.vectors import joined, nearest_centroids


@pytest.mark.parametrize("share", [0, 0.33, 1])
def test_the_cosine_of_joined_views_is_their_weighted_mean(share):
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(6, 4)), 9 * rng.normal(size=(6, 7))
    both = joined(one, other, share)
    assert both.shape == (6, 11) and both.dtype == np.float32
    one, other = unit(one), unit(other)
    expected = (1 - share) * one @ one.T + share * other @ other.T
    np.testing.assert_allclose(both @ both.T, expected, atol=1e-6)


@pytest.mark.parametrize("chunk", [2, 1024])
def test_the_nearest_centroid_is_another_one(chunk, monkeypatch):
    monkeypatch.setattr(vectors, "CENTROIDS", chunk)
    centroids = np.random.default_rng(1).normal(size=(7, 5))
    cosines = centroids @ centroids.T
    np.fill_diagonal(cosines, -np.inf)
    assert np.array_equal(nearest_centroids(centroids), cosines.argmax(1))
