"""Points around centres on the sphere, for the tests of clustering."""

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage


def blobs(n_speakers=20, per_speaker=40, spread=0.15, dimensions=16, seed=0):
    """Speakers on the sphere, utterances around them at random lengths."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(n_speakers, dimensions))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    speakers = rng.permutation(np.repeat(np.arange(n_speakers), per_speaker))
    points = centres[speakers] + spread * rng.normal(
        size=(len(speakers), dimensions)
    )
    lengths = rng.uniform(0.1, 30, size=(len(speakers), 1))
    return (lengths * points).astype(np.float32), speakers


def recordings(n_speakers=24, each=15, seed=0):
    """Speakers, and embeddings of which most directions know the channel."""
    rng = np.random.default_rng(seed)
    speakers = np.repeat(np.arange(n_speakers), each)
    voices = rng.normal(size=(n_speakers, 6))[speakers]
    voices += 0.4 * rng.normal(size=voices.shape)
    channels = rng.normal(size=(len(speakers), 12))
    return speakers, np.hstack([voices, channels]).astype(np.float32)


def unit(points):
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def ward_by_scipy(points, n_clusters):
    return fcluster(linkage(points, "ward"), n_clusters, "maxclust")
