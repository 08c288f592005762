"""Clusters of utterances: made once, or again by what the first ones show."""

import logging

import numpy as np
import pytest

from lgl_plugin.clustering.kmeans import TorchKMeans
from lgl_plugin.clustering.two_step import TwoStepKMeans
from lgl_plugin.inference.backends import Whitening
from lgl_plugin.metrics.agreement import ami
from lgl_plugin.training.clusters import pseudo_speakers


def recordings(n_speakers=24, each=15, seed=0):
    """Speakers, and embeddings of which most directions know the channel."""
    rng = np.random.default_rng(seed)
    speakers = np.repeat(np.arange(n_speakers), each)
    voices = rng.normal(size=(n_speakers, 6))[speakers]
    voices += 0.4 * rng.normal(size=voices.shape)
    channels = rng.normal(size=(len(speakers), 12))
    return speakers, np.hstack([voices, channels]).astype(np.float32)


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
    assert points.shape != others.shape or not np.allclose(points, others)
    assert cluster.n_clusters == n_clusters  # the next round estimates again


def test_clusters_that_tell_nothing_are_kept_and_named(caplog):
    vectors = recordings(2, 3)[1]
    with caplog.at_level(logging.WARNING):
        found, points = pseudo_speakers(vectors, ward(6), twice=True)
    assert found.n_clusters == 6 and points is vectors
    assert "made once, not twice" in caplog.text
