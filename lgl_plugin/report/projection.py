"""Which utterances a map of embeddings shows, and where they lie in it."""

import numpy as np

POINTS = 2000
SEED = 0


def sample(labels, groups, points=POINTS, seed=SEED):
    """Chooses the utterances of a map.

    Arguments
    ---------
    labels : numpy.ndarray, (N,), int
        Of all utterances.
    groups : array-like of int
        Those in colour: up to half the map is theirs, lest they drown among
        thousands of clusters.
    points : int
        How many utterances to draw at most.
    seed : int
        Of the draw.

    Returns
    -------
    numpy.ndarray, (n,), int64
        Indices into `labels`, rising.

    Example
    -------
    >>> sample(np.array([0, 1, 0, 1, 2]), [1], points=5).tolist()
    [0, 1, 2, 3, 4]
    >>> chosen = sample(np.arange(1000) % 500, [7], points=100)
    >>> len(chosen), (chosen % 500 == 7).sum().item()
    (100, 2)
    """
    if len(labels) <= points:
        return np.arange(len(labels))
    draw = np.random.default_rng(seed)
    share = points // 2 // max(len(groups), 1)
    chosen = []
    for group in groups:
        members = np.flatnonzero(labels == group)
        size = min(share, len(members))
        chosen.append(draw.choice(members, size, replace=False))
    rest = np.flatnonzero(~np.isin(labels, groups))
    size = min(points - sum(map(len, chosen)), len(rest))
    chosen.append(draw.choice(rest, size, replace=False))
    return np.sort(np.concatenate(chosen))


def project(vectors, seed=SEED):
    """Embeddings to points in the plane, by principal components and t-SNE.

    Arguments
    ---------
    vectors : numpy.ndarray, (n, D), float
        Five at least; brought to unit length here, as for the clustering.
    seed : int
        Of t-SNE.

    Returns
    -------
    points : numpy.ndarray, (n, 2), float32
    spread : float
        The share of the variance that the principal components keep.

    Example
    -------
    >>> points, spread = project(np.eye(8))
    >>> points.shape, round(spread, 3)
    ((8, 2), 1.0)
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    vectors = np.asarray(vectors, np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = vectors / np.maximum(norms, np.finfo(np.float32).tiny)
    components = PCA(min(50, *vectors.shape), random_state=seed)
    points = components.fit_transform(vectors)
    spread = float(components.explained_variance_ratio_.sum())
    # A coarse angle and few iterations: seconds count, not digits.
    neighbours = TSNE(
        perplexity=min(30, (len(points) - 1) / 3),
        angle=0.8,
        max_iter=500,
        init="pca",
        random_state=seed,
    )
    return neighbours.fit_transform(points), spread
