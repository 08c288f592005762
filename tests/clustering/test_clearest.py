"""Groups by silhouette, against SciPy's tree and scikit-learn's silhouette."""

import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster, linkage
from sklearn.metrics import adjusted_rand_score, silhouette_samples

from lgl_plugin.clustering.clearest import clearest_clusters, silhouettes
from lgl_plugin.clustering.vectors import normalised


def heard(n_speakers, spread, seed, offset=0.0):
    """Unit vectors of some utterances of each speaker, and the speakers."""
    rng = np.random.default_rng(seed)
    speakers = np.repeat(np.arange(n_speakers), rng.integers(2, 8, n_speakers))
    vectors = rng.normal(size=(n_speakers, 16))[speakers] + offset
    vectors += spread * rng.normal(size=vectors.shape)
    return normalised(vectors), speakers


def test_silhouettes_are_scikit_learns():
    vectors, labels = heard(9, 1.0, seed=0)
    expected = silhouette_samples(vectors, labels, metric="cosine")
    found = silhouettes(vectors, labels)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_vector_alone_and_a_single_cluster():
    vectors = np.float32([[1, 0, 0], [0.8, 0.6, 0], [0, 0, 1]])
    found = silhouettes(vectors, np.array([0, 0, 1]), alone=0.5)
    assert found[2] == pytest.approx(0.5)  # 1 from others, joined at 0.5
    found = silhouettes(vectors[:2], np.array([0, 0]))
    np.testing.assert_allclose(found, 0.8, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_no_cut_of_the_tree_is_clearer(seed):
    """Of few enough points that every number of clusters is tried."""
    vectors, _ = heard(8, 0.8, seed)
    tree = linkage(vectors, "average", metric="cosine")
    clarity = {}
    for number in range(2, len(vectors)):
        labels = fcluster(tree, number, "maxclust")
        each = silhouette_samples(vectors, labels, metric="cosine")
        # scikit-learn's is 0 for a point alone, where ours is below that.
        alone = np.bincount(labels)[labels] == 1
        for row in np.flatnonzero(alone):
            means = [
                (1 - vectors[labels == other] @ vectors[row]).mean()
                for other in {*labels} - {labels[row]}
            ]
            each[row] = (min(means) - 1) / max(1, min(means))
        clarity[number] = each.mean()
    found = clearest_clusters(vectors)
    best = max(clarity, key=clarity.get)
    expected = fcluster(tree, best, "maxclust")
    assert adjusted_rand_score(expected, found) == 1
    assert (np.diff(np.bincount(found)) <= 0).all()  # the largest first


@pytest.mark.parametrize("n_speakers", [2, 30, 120])
def test_the_number_of_speakers_is_found(n_speakers):
    vectors, speakers = heard(n_speakers, 0.3, seed=1)
    found = clearest_clusters(vectors)
    # Numbers that are tried lie a few per cent apart.
    assert found.max() + 1 == pytest.approx(n_speakers, rel=0.05)
    assert adjusted_rand_score(speakers, found) > 0.95
