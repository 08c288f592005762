"""A split of unlabelled recordings by speaker: whole clusters are kept out.

An encoder that was trained on some speakers tells these apart better than
strangers. So it must be judged by other speakers, for which clusters
stand in.
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

    Clusters come in random order until a hundred of them hold 400 recordings;
    one that would bring the share kept out over a half is passed over, and so
    is one that holds a recording that is `labelled`, bool (N,). Takes
    embeddings (N, D), N from 8.
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
