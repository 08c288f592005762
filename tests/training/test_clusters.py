"""Clusters of utterances: made once, or again by what the first ones show."""

import logging

import numpy as np
import pytest
from blobs import recordings, unit

from lgl_plugin.clustering.kmeans import TorchKMeans
from lgl_plugin.clustering.two_step import TwoStepKMeans
from lgl_plugin.inference.backends import Whitening
from lgl_plugin.metrics.agreement import ami
from lgl_plugin.training.clusters import pseudo_speakers


def ward(n_clusters="auto"):
    return TwoStepKMeans(TorchKMeans(50_000), n_clusters)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n_clusters", ["auto", 24])
@pytest.mark.parametrize("share", [0, 0.2])
def test_the_second_clusters_know_speakers_better(seed, n_clusters, share):
    speakers, vectors = recordings(seed=seed)
    cluster, log_mels = ward(n_clusters), None
    if share:
        rng = np.random.default_rng(seed)
        log_mels = rng.normal(size=(24, 5))[speakers]
        log_mels = log_mels + rng.normal(size=(len(speakers), 5))
    options = cluster, Whitening(1.0), log_mels, share
    once, points = pseudo_speakers(vectors, *options)
    twice, others = pseudo_speakers(vectors, *options, twice=True)
    assert ami(speakers, twice.labels) > ami(speakers, once.labels) + 0.02
    assert twice.n_clusters == once.n_clusters
    if share:  # beside other directions, the same statistics
        statistics = np.sqrt(share) * unit(log_mels)
        for joined in (points, others):
            np.testing.assert_allclose(joined[:, -5:], statistics, atol=1e-5)
    assert others.shape[1] <= vectors.shape[1] + 5 * bool(share)
    assert not np.allclose(points[:, :5], others[:, :5])
    assert cluster.n_clusters == n_clusters  # the next round estimates again


def test_as_many_clusters_as_embeddings_are_kept_and_named(caplog):
    vectors = recordings(2, 3)[1]
    with caplog.at_level(logging.WARNING):
        found, points = pseudo_speakers(vectors, ward(6), twice=True)
    assert found.n_clusters == 6 and points is vectors
    assert "made once, not twice" in caplog.text


def test_what_is_no_embedding_is_an_error_all_the_same():
    """Only what PLDA cannot learn from is passed over."""
    vectors = recordings()[1]

    def cluster(points):
        found = ward(24)(points)
        vectors[3] = np.nan
        return found

    with pytest.raises(ValueError, match="not finite"):
        pseudo_speakers(vectors, cluster, twice=True)
