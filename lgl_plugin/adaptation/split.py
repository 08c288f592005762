"""Splits unlabelled recordings by speaker: keeps whole clusters out.

An encoder tells the speakers that it was trained on apart better than others.
So training must be judged by other speakers. Clusters stand for speakers.
"""

import numpy as np

from lgl_plugin.inference.ward_clusters import ward_labels

# Stop once this many clusters and recordings are kept out; never keep out
# more than this share of the recordings.
SPEAKERS, RECORDINGS, SHARE = 100, 400, 0.5


def kept_out(
    vectors: np.ndarray,
    labelled: np.ndarray,
    seed: int = 0,
    device: str = "cpu",
) -> np.ndarray:
    """Draws clusters to keep out of training; returns their members, bool (N,).

    Takes embeddings (N, D), N from 8. Clusters are drawn in random order, until
    at least 100 clusters with at least 400 recordings are out. A cluster that
    would bring the share above a half is skipped, and so is a cluster with a
    `labelled` recording, bool (N,).
    """
    labels = ward_labels(vectors, seed=seed, device=device)
    sizes = np.bincount(labels)
    free = np.setdiff1d(np.arange(len(sizes)), labels[labelled])
    order = np.random.default_rng(seed).permutation(free)
    out, held = [], 0
    for cluster in order:
        if len(out) >= SPEAKERS and held >= RECORDINGS:
            break
        if held + sizes[cluster] <= SHARE * len(vectors):
            out.append(cluster)
            held += sizes[cluster]
    return np.isin(labels, out)
