"""Estimates the number of clusters by Ward's tree, without labels or a grid.

Embeddings without clusters can be split into K parts too, and a larger K leaves
a smaller sum of squares. So `estimate` also clusters a cloud of as many normal
vectors with the same mean and covariance. The gap at K is the share of the sum
of squares that the embeddings' clusters explain, less the share that the
cloud's clusters explain. The gap is one of shares because the gap of logarithms
(Tibshirani et al. 2001) never stops growing here. The top of the gap is flat
where clusters overlap. Among the K within a tenth of the largest gap (`SLACK`),
the estimate is the one that loses least if each doubling of K costs a tenth.

The estimate was measured on embeddings whitened with shrinkage, of 16 sets with
known speakers: three corpora, trained and statistical encoders, parts of the
speakers and of the utterances; 20 to 190 speakers, 378 to 3,800 utterances. It
was 0.59 to 2.8 times the number of speakers, 1.09 times on average, and off by
a mean factor of 1.32. The labels' AMI with the speakers was 0.02 below that of
the best number. For 15 of the 16 sets the AMI was above that of k-means with
the true number on unwhitened embeddings. Few utterances per speaker, and
speakers of uneven shares, lower the estimate. Few speakers whose sessions lie
far apart raise it. On unwhitened embeddings the estimate was 0.38 times the
number of speakers: whiten them. The index of Calinski and Harabasz, the largest
gap of heights and the agreement of two halves found 2 clusters, and the
silhouette found 1 to 5 times too many.

If the largest gap is near 0 (`CHANCE`), as with one utterance per speaker, its
top is at a random K, mostly 2. The estimate is then at least a tenth of the
number of embeddings, or of the first step's clusters. For made-up speakers too
noisy for the gap, such labels agreed better with the speakers than those of 2
clusters.
"""

import dataclasses
import logging

import numpy as np

from lgl_plugin.clustering.first_step import Parts, parts
from lgl_plugin.clustering.kmeans import KMeans
from lgl_plugin.clustering.vectors import chunks, normalised
from lgl_plugin.clustering.ward import Tree, ward

logger = logging.getLogger(__name__)

# Clusters of a first step: as many as Ward's method joins in two minutes.
FIRST_STEP = 50_000
# Share of the largest gap that a smaller K may lose. At 0 the estimate is 1.6
# times as high and varies by a third with the seed.
SLACK = 0.1
# Largest difference in explained share between two normal clouds. Useful
# encoders had gaps of 0.1 to 0.4.
CHANCE = 0.02
GUESSED_SIZE = 10  # utterances per cluster, if the gap is near 0


@dataclasses.dataclass(frozen=True, eq=False)
class Estimate:
    """An estimated number of clusters, and the curves that it is read from.

    Arguments
    ---------
    n_clusters : int
        The estimate.
    explained, by_chance : numpy.ndarray
        Share of the sum of squares that 1, 2, … clusters explain, of the
        embeddings and of a normal cloud, float64 (number of parts joined,).

    Example
    -------
    >>> Estimate(2, np.array([0, 0.9, 1]), np.array([0, 0.6, 1])).gap.round(1)
    array([0. , 0.3, 0. ])
    """

    n_clusters: int
    explained: np.ndarray
    by_chance: np.ndarray

    @property
    def gap(self) -> np.ndarray:
        """The explained share less the share by chance, at 1, 2, … clusters."""
        return self.explained - self.by_chance

    @property
    def is_guess(self) -> bool:
        """True if clusters explain hardly more than chance."""
        gap = self.gap
        return bool(gap[1 : len(gap) // 2].max() < CHANCE)

    def warn_of_guess(self) -> None:
        """Logs a warning if the number is a guess."""
        if self.is_guess:
            logger.warning(
                "n_clusters: auto finds no recordings that belong together, so "
                "%d is a guess. Either this encoder does not tell speakers "
                "apart: train it longer. Or the recordings are too few, as "
                "below 140 mostly. Or most speakers have one recording only: "
                "then there is nothing to cluster, and the encoder is "
                "best left as it is. If you know about how many speakers there "
                "are, say so in training: by --n_clusters in Stage II, by "
                "--ssps_cluster='{n_clusters: …}' in Stage I",
                self.n_clusters,
            )


def estimate(
    kmeans: KMeans,
    embeddings: np.ndarray,
    first: Parts | None = None,
    tree: Tree | None = None,
) -> Estimate:
    """Estimates the number of clusters of embeddings.

    Arguments
    ---------
    kmeans : KMeans
        Makes the parts to join if there are more embeddings than its clusters.
        Its seed is also that of the normal cloud.
    embeddings : numpy.ndarray
        Embeddings (N, D), of any length but 0.
    first, tree : Parts and Tree, optional
        Results of `parts` and `ward` on the embeddings, if already computed.

    Returns
    -------
    Estimate
        If the clusters explain hardly more than chance (`is_guess`), the number
        is at least a tenth of the number of embeddings or of the first step's
        clusters.

    Raises
    ------
    ValueError
        If there are fewer than 8 embeddings, all equal, or one is NaN,
        infinite or zero.

    Example
    -------
    >>> from lgl_plugin.clustering.kmeans import TorchKMeans
    >>> rng = np.random.default_rng(0)
    >>> embeddings = np.repeat(np.eye(6), 50, axis=0)
    >>> embeddings += rng.normal(scale=0.05, size=embeddings.shape)
    >>> estimate(TorchKMeans(50_000), embeddings).n_clusters
    6
    """
    embeddings = np.asarray(embeddings)
    check_enough(min(len(embeddings), kmeans.n_clusters))
    first = first or parts(kmeans, embeddings)
    tree = tree or ward(first.means, first.sizes)
    explained = _explained(first, tree)
    cloud = parts(kmeans, _normal_cloud(embeddings, kmeans.seed))
    by_chance = _explained(cloud, ward(cloud.means, cloud.sizes))
    n_parts = min(len(explained), len(by_chance))
    # k-means may drop empty parts, so only the common length is compared.
    check_enough(n_parts)
    explained, by_chance = explained[:n_parts], by_chance[:n_parts]
    gap = (explained - by_chance)[1 : n_parts // 2]
    doublings = np.log2(np.arange(2, 2 + len(gap)))
    value = gap - SLACK * gap.max() * doublings
    value[gap < (1 - SLACK) * gap.max()] = -np.inf
    result = Estimate(2 + int(np.argmax(value)), explained, by_chance)
    if result.is_guess:
        n_clusters = max(result.n_clusters, n_parts // GUESSED_SIZE)
        result = dataclasses.replace(result, n_clusters=n_clusters)
    return result


def check_enough(n_points: int) -> None:
    """Raises ValueError if there are too few points for an estimate."""
    if n_points < 8:
        raise ValueError(
            f"{n_points} utterances, or clusters of the first step, are too "
            "few to estimate a number of clusters from: 8 are needed"
        )


def _explained(first, tree):
    """Returns the share of the sum of squares that 1, 2, … clusters explain."""
    within = first.within + tree.within()
    if not within[0] > 0:
        raise ValueError(
            "all embeddings are equal: they have no number of clusters"
        )
    return 1 - within / within[0]


def _normal_cloud(embeddings, seed):
    """Draws n normal vectors with the unit embeddings' mean and covariance."""
    n, dimensions = embeddings.shape
    total = np.zeros(dimensions)
    squares = np.zeros((dimensions, dimensions))
    for rows in chunks(n):
        points = normalised(embeddings[rows]).astype(np.float64)
        total += points.sum(axis=0)
        squares += points.T @ points
    mean = total / n
    variances, axes = np.linalg.eigh(squares / n - np.outer(mean, mean))
    spread = (axes * np.sqrt(np.maximum(variances, 0))).T
    rng = np.random.default_rng(seed)
    cloud = np.empty((n, dimensions), np.float32)
    for rows in chunks(n):
        cloud[rows] = rng.normal(size=cloud[rows].shape) @ spread + mean
    return cloud
