"""Clusters that know a few speakers."""

import numpy as np
from blobs import blobs, unit
from hypothesis import given as drawn, strategies as st
from sklearn.metrics import adjusted_rand_score

from lgl_plugin.clustering.kmeans import TorchKMeans
from lgl_plugin.clustering.seeding import seeded


@drawn(st.data())
def test_labels_hold_and_other_clusters_stay(data):
    """Whatever the clusters; those that nobody takes over lose seeds alone."""
    n = data.draw(st.integers(1, 12))
    column = st.lists(st.integers(-1, 3), min_size=n, max_size=n)
    labels = np.array(data.draw(column.filter(lambda x: max(x) >= 0)))
    known = np.array(data.draw(column.filter(lambda x: max(x) >= 0)))
    speakers = np.unique(known[known >= 0])
    known[known >= 0] = np.searchsorted(speakers, known[known >= 0])
    points = np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32)
    found = seeded(points, labels, known)
    assert (found[known >= 0] == known[known >= 0]).all()
    assert (found[(known < 0) & (labels < 0)] == -1).all()
    assert {*found} - {-1} == {*range(found.max() + 1)}  # no gaps
    free = (known < 0) & (labels >= 0)
    pseudo = free & (found >= len(speakers))
    assert (found[free] >= 0).all()
    # Clusters stay together, apart from others, and go over as a whole.
    for label in np.unique(labels[free]):
        members = found[free & (labels == label)]
        assert len({*members}) == 1 or (members < len(speakers)).all()
    for label in np.unique(found[pseudo]):
        assert len({*labels[found == label]}) == 1


def test_two_speakers_part_a_cluster_that_they_share():
    """And parts of one speaker are not joined to another by one stray."""
    points, speakers = blobs(6, 20, spread=0.03)
    points = unit(points).astype(np.float32)
    clusters = np.where(speakers == 1, 0, speakers)  # 0 and 1 are joined
    clusters[np.flatnonzero(speakers == 2)[0]] = 3  # a stray
    known = np.full(len(points), -1)
    for speaker in (0, 1, 2):
        known[np.flatnonzero(speakers == speaker)[:3]] = speaker
    found = seeded(points, clusters, known)
    assert adjusted_rand_score(speakers, found) == 1
    assert adjusted_rand_score(speakers, clusters) < 0.9


def test_all_that_a_clusterer_makes_will_do():
    points, speakers = blobs(5, 20, spread=0.03)
    clusters = TorchKMeans(5)(points).labels
    known = np.where(np.arange(len(points)) % 10 == 0, speakers, -1)
    found = seeded(np.asarray(points), clusters, known)
    assert (found == speakers).mean() > 0.95
