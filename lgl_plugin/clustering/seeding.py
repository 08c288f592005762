"""Adapts clusters to the given speakers of a few utterances."""

import numpy as np

from lgl_plugin.clustering.first_step import means_of
from lgl_plugin.clustering.vectors import normalised


def seeded(
    embeddings: np.ndarray, labels: np.ndarray, given: np.ndarray
) -> np.ndarray:
    """Makes the speakers of labelled utterances the first clusters.

    `embeddings` (N, D) were clustered to `labels`, int64 (N,), -1 for none.
    `given` has the speakers from 0, each with an utterance, -1 if unknown. A
    speaker's cluster holds its labelled utterances and takes over the cluster
    that held most of them. If several speakers take over the same cluster, each
    utterance goes to the speaker whose labelled utterances are nearer, by the
    cosine with their mean. Other clusters keep their utterances without given
    speakers, and are numbered after the speakers, without gaps.
    """
    is_given = given >= 0
    n_speakers = int(given.max()) + 1
    means = normalised(means_of(embeddings, given)[0].numpy())
    counts = np.zeros((n_speakers, int(labels.max()) + 1), np.int64)
    seeds = is_given & (labels >= 0)
    np.add.at(counts, (given[seeds], labels[seeds]), 1)
    home = np.where(counts.any(axis=1), counts.argmax(axis=1), -1)
    result = np.full(len(labels), -1)
    for cluster in np.unique(home[home >= 0]):
        owners = np.flatnonzero(home == cluster)
        members = np.flatnonzero(labels == cluster)
        cosines = normalised(embeddings[members]) @ means[owners].T
        result[members] = owners[cosines.argmax(axis=1)]
    result[is_given] = given[is_given]
    left = (result < 0) & (labels >= 0)
    _, numbers = np.unique(labels[left], return_inverse=True)
    result[left] = n_speakers + numbers
    return result
