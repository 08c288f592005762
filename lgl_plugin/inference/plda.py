"""PLDA on pseudo-speakers: which directions tell clusters apart.

The two-covariance model of probabilistic linear discriminant analysis (Ioffe
2006; Brummer and de Villiers 2010): an embedding is its speaker's mean plus a
deviation, both normally distributed. Here clusters stand for speakers, so no
label is read.
"""

import numpy as np
from numpy.typing import ArrayLike

from lgl_plugin.inference.backends import (
    NO_VARIANCE,
    Backend,
    mean_of,
    unit_blocks,
)

# Of the mean variance within clusters, added to each direction's. From 0.3 to
# 3 the clusters behind it agree about as well with the speakers.
SHRINKAGE = 1.0


def plda_projection(embeddings: ArrayLike, labels: np.ndarray) -> Backend:
    """Weights directions by how well they tell clusters apart.

    In directions z of length 1, in which clusters vary by the variance 1 and
    their means by b, PLDA's log-likelihood ratio of two embeddings has one term
    that joins them, sum(z1 * z2 * b / (1 + 2 b)). The projection is z *
    sqrt(b / (1 + 2 b)), of which that term is the inner product.

    Arguments
    ---------
    embeddings : array-like, (N, D), float
        Of any length but 0: each counts at length 1.
    labels : numpy.ndarray, (N,), int64
        Their clusters, from 0 without gaps, 2 to N - 1 of them.

    Raises
    ------
    ValueError
        If there are fewer or more clusters, their members do not vary, or
        their means differ no more than by chance.

    Example
    -------
    >>> rng = np.random.default_rng(0)
    >>> speakers = np.repeat(np.arange(50), 10)
    >>> voices, channels = rng.normal(size=(50, 2)), rng.normal(size=(500, 2))
    >>> vectors = np.hstack([voices[speakers], channels])
    >>> vectors += 0.1 * rng.normal(size=vectors.shape)
    >>> projection = plda_projection(vectors, speakers).projection
    >>> np.linalg.norm(projection, axis=1).round(1)
    array([1.6, 1.6, 0.2, 0.1])
    """
    vectors = np.asarray(embeddings)
    sizes = np.bincount(labels)
    n_rows, n_clusters = len(vectors), len(sizes)
    if not 1 < n_clusters < n_rows:
        raise ValueError(
            f"PLDA needs from 2 to {n_rows - 1} clusters of {n_rows} "
            f"embeddings, got {n_clusters}"
        )
    mean = mean_of(vectors)
    sums = np.zeros((n_clusters, len(mean)))
    total = np.zeros((len(mean), len(mean)))
    for rows, unit in unit_blocks(vectors):
        unit -= mean
        np.add.at(sums, labels[rows], unit)
        total += unit.T @ unit
    between = (sums / sizes[:, None]).T @ sums
    within = (total - between) / (n_rows - n_clusters)
    # Of unequal sizes, as in the analysis of variance.
    size = (n_rows - (sizes**2).sum() / n_rows) / (n_clusters - 1)
    between = (between / (n_clusters - 1) - within) / size
    if not np.trace(within) > NO_VARIANCE:  # rounding may leave 1e-17
        raise ValueError("the members of each cluster do not vary")
    values, axes = np.linalg.eigh(within)
    shrunk = np.maximum(values, 0) + SHRINKAGE * np.trace(within) / len(mean)
    whitening = axes / np.sqrt(shrunk)
    spread, turn = np.linalg.eigh(whitening.T @ between @ whitening)
    useful = spread > 0
    if not useful.any():
        raise ValueError(
            "the means of the clusters differ no more than by chance"
        )
    spread = spread[useful]
    weights = np.sqrt(spread / (1 + 2 * spread))
    return Backend(mean, whitening @ turn[:, useful] * weights)
