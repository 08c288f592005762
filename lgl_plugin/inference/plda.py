"""Fits PLDA on clusters instead of labelled speakers, and scores by it.

The two-covariance model of probabilistic linear discriminant analysis (Ioffe
2006; Brummer and de Villiers 2010): an embedding is its speaker's mean plus a
deviation, both normally distributed. Clusters stand for speakers, so that no
label is read.

PLDA serves the clustering of a training, and scoring. It is not used by the
verdict of `lgl adapt`, which clusters by the scores that it judges, nor by
`lgl who`, which clusters by the encoder's own cosine.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

from lgl_plugin.inference.backends import (
    NO_VARIANCE,
    Backend,
    mean_of,
    unit_blocks,
)

# The share of the mean variance within clusters that is added to each
# direction's. Values from 0.3 to 3 give clusters and scores of about the same
# quality.
SHRINKAGE = 1.0
PAIRS = 16384  # pairs scored at once: tens of megabytes


class PldaError(ValueError):
    """Clusters on which PLDA cannot be fitted."""


@dataclasses.dataclass(frozen=True, eq=False)
class Plda:
    """Directions in which the means of clusters vary.

    In each direction the variance within clusters, with shrinkage, is 1.

    Arguments
    ---------
    mean : numpy.ndarray, (D,), float64
        Is subtracted from embeddings of length 1.
    axes : numpy.ndarray, (D, D'), float64
        The difference is multiplied by it.
    between : numpy.ndarray, (D',), float64
        The variance of the clusters' means in each direction.

    Example
    -------
    >>> rng = np.random.default_rng(0)
    >>> speakers = np.repeat(np.arange(50), 10)
    >>> voices, channels = rng.normal(size=(50, 2)), rng.normal(size=(500, 2))
    >>> vectors = np.hstack([voices[speakers], channels])
    >>> vectors += 0.1 * rng.normal(size=vectors.shape)
    >>> plda = fit_plda(vectors, speakers)
    >>> np.linalg.norm(plda.projection.projection, axis=1).round(1)
    array([1.6, 1.6, 0.2, 0.1])
    >>> same, different = plda.ratios(vectors, [0, 0], [1, 499])
    >>> bool(same > 0 > different)
    True
    """

    mean: np.ndarray
    axes: np.ndarray
    between: np.ndarray

    @property
    def projection(self) -> Backend:
        """The back-end whose inner products are the ratio's joint term.

        In `ratios` only one term depends on both embeddings z and z' along the
        axes: the sum of z * z' * b / (1 + 2 b). This back-end's inner product
        is that term. Clusterings use its cosine.
        """
        weights = np.sqrt(self.between / (1 + 2 * self.between))
        return Backend(self.mean, self.axes * weights)

    def ratios(
        self, embeddings: ArrayLike, first: ArrayLike, second: ArrayLike
    ) -> np.ndarray:
        """Computes log-likelihood ratios of pairs, float32 (T,).

        A ratio compares one speaker with two speakers. Above 0 one speaker is
        more likely, as far as clusters are speakers. Embeddings are (U, D),
        float; `first` and `second` are their rows, (T,), int64. Raises
        ValueError if an embedding is not finite.
        """
        points = Backend(self.mean, self.axes)(embeddings).astype(np.float64)
        b = self.between
        joint = points * (b / (1 + 2 * b))
        single = (points**2) @ (-0.5 * b**2 / ((1 + b) * (1 + 2 * b)))
        constant = (np.log1p(b) - 0.5 * np.log1p(2 * b)).sum()
        first, second = np.asarray(first), np.asarray(second)
        ratios = np.empty(len(first), np.float32)
        for start in range(0, len(ratios), PAIRS):
            block = slice(start, start + PAIRS)
            i, j = first[block], second[block]
            ratios[block] = np.einsum("td,td->t", joint[i], points[j])
            ratios[block] += single[i] + single[j] + constant
        return ratios


def fit_plda(embeddings: ArrayLike, labels: np.ndarray) -> Plda:
    """Estimates PLDA from embeddings (N, D) and their clusters.

    Arguments
    ---------
    embeddings : array-like, (N, D), float
        Of any length but 0; each is scaled to length 1.
    labels : numpy.ndarray, (N,), int64
        Their clusters, from 0 without gaps, 2 to N - 1 clusters.

    Raises
    ------
    PldaError
        If there are fewer or more clusters, if the members of clusters do not
        vary, or if the means of clusters vary no more than the members explain.
    ValueError
        If an embedding is not finite.

    Example
    -------
    >>> vectors = np.array([[9, 1, 0], [9, 2, 1], [1, 9, 0], [2, 9, 1]])
    >>> plda = fit_plda(vectors, np.array([0, 0, 1, 1]))
    >>> ratios = plda.ratios(vectors, [0, 0], [1, 2])
    >>> bool(ratios[0] > 0 > ratios[1])
    True
    """
    vectors = np.asarray(embeddings)
    sizes = np.bincount(labels)
    n_rows, n_clusters = len(vectors), len(sizes)
    if not 1 < n_clusters < n_rows:
        raise PldaError(
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
    # The effective size of clusters of unequal sizes, as in the analysis of
    # variance.
    size = (n_rows - (sizes**2).sum() / n_rows) / (n_clusters - 1)
    between = (between / (n_clusters - 1) - within) / size
    if not np.trace(within) > NO_VARIANCE:  # rounding may leave 1e-17
        raise PldaError("the members of each cluster do not vary")
    values, axes = np.linalg.eigh(within)
    shrunk = np.maximum(values, 0) + SHRINKAGE * np.trace(within) / len(mean)
    whitening = axes / np.sqrt(shrunk)
    spread, turn = np.linalg.eigh(whitening.T @ between @ whitening)
    if not spread.max() > NO_VARIANCE:
        raise PldaError(
            "the means of the clusters vary in no direction more than by the "
            "members"
        )
    useful = spread > NO_VARIANCE * spread.max()  # others are rounding errors
    return Plda(mean, whitening @ turn[:, useful], spread[useful])
