import numpy as np
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import adjusted_rand_score

from lgl_plugin.inference.backends import Whitening
from lgl_plugin.inference.ward_clusters import ward_estimate, ward_labels


def test_clusters_are_those_of_ward_s_method_behind_whitening():
    """One direction, the channel's, is far wider than those of speakers."""
    rng = np.random.default_rng(0)
    speakers = np.repeat(np.arange(12), 15)
    vectors = rng.normal(size=(12, 16))[speakers]
    vectors += 0.2 * rng.normal(size=vectors.shape)
    vectors[:, 0] += 20 * rng.normal(size=len(vectors))
    white = Whitening(1.0).fit_transform(vectors)
    white /= np.linalg.norm(white, axis=1, keepdims=True)
    expected = AgglomerativeClustering(12).fit_predict(white)
    found = ward_labels(vectors, 12)
    assert adjusted_rand_score(found, expected) == 1
    estimated = ward_estimate(vectors)
    assert len(np.unique(ward_labels(vectors))) == estimated.n_clusters
