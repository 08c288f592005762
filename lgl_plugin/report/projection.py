"""Projects a sample of embeddings to the plane, for the map of clusters."""

from collections.abc import Sequence

import numpy as np

POINTS = 2000
SEED = 0


def sample(labels: np.ndarray, groups: Sequence[int]) -> np.ndarray:
    """Draws at most `POINTS` utterances; returns their indices, sorted.

    Up to half of them come from the `groups` that are drawn in colour: among
    thousands of clusters a uniform sample would have few of these.
    """
    if len(labels) <= POINTS:
        return np.arange(len(labels))
    draw = np.random.default_rng(SEED)
    share = POINTS // 2 // max(len(groups), 1)
    chosen = []
    for group in groups:
        members = np.flatnonzero(labels == group)
        size = min(share, len(members))
        chosen.append(draw.choice(members, size, replace=False))
    rest = np.flatnonzero(~np.isin(labels, groups))
    size = min(POINTS - sum(map(len, chosen)), len(rest))
    chosen.append(draw.choice(rest, size, replace=False))
    return np.sort(np.concatenate(chosen))


def project(vectors: np.ndarray) -> tuple[np.ndarray, float]:
    """Maps vectors (n, D), n >= 5, to the plane by PCA and then t-SNE.

    The vectors are scaled to length 1, as for the clustering. Returns the
    points, float32 (n, 2), and the share of the variance that PCA kept.
    """
    # Imported here: sklearn takes seconds, and a page may have no map.
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from sklearn.preprocessing import normalize

    components = PCA(min(50, *vectors.shape), random_state=SEED)
    # `normalize` leaves a vector of length 0 as it is: the page of a run that
    # stopped at one must still be made.
    points = components.fit_transform(normalize(vectors))
    spread = float(components.explained_variance_ratio_.sum())
    # A coarse angle and few iterations: speed matters more than precision.
    neighbours = TSNE(
        perplexity=min(30, (len(points) - 1) / 3),
        angle=0.8,
        max_iter=500,
        init="pca",
        random_state=SEED,
    )
    return neighbours.fit_transform(points), spread
