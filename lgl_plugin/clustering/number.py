"""Number of clusters by Ward's tree, without labels and without a grid.

Embeddings without clusters can be split into K parts too, and a larger K
leaves a smaller sum of squares. So `estimate` also joins a cloud of as many
normal vectors with the same mean and covariance. The gap at K is how much more
of the sum of squares the embeddings' clusters explain than the cloud's. It is
a gap of shares: that of logarithms (Tibshirani et al. 2001) never stops growing
here. Its top is flat where clusters overlap. The estimate is the K within a
tenth of the largest gap (`SLACK`) that loses least if each doubling of K costs
a tenth.

On embeddings whitened with shrinkage, of 16 sets with known speakers (three
corpora, trained and statistical encoders, parts of the speakers and of the
utterances; 20 to 190 speakers, 378 to 3,800 utterances) it was 0.59 to 2.8
times the number of speakers, 1.09 times on average, and off by a factor of
1.32. The labels' AMI with the speakers was 0.02 under that of the best
number, and for 15 of the 16 above that of k-means with the true number on
unwhitened embeddings. Few utterances of a speaker and speakers of uneven shares
lower the estimate; few speakers whose sessions lie far apart raise it. On
unwhitened embeddings it was 0.38 times the number of speakers: whiten them.
The index of Calinski and Harabasz, the largest gap of heights and the agreement
of two halves found 2 clusters there, and the silhouette 1 to 5 times too many.

If the largest gap is near 0 (`CHANCE`), as with one utterance of each speaker,
its top is at a random K, mostly 2. The estimate is then at least a tenth of the
number of embeddings, or of the first step's clusters: for made-up speakers too
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

# Clusters of a first step, as many as Ward's method joins in two minutes.
FIRST_STEP = 50_000
# Share of the largest gap. At 0 the estimate is 1.6 times as high and moves by
# a third with the seed.
SLACK = 0.1
# Two normal clouds differ by up to this in what their clusters explain;
# useful encoders had 0.1 to 0.4.
CHANCE = 0.02
GUESSED_SIZE = 10  # of a cluster, where nothing else tells


@dataclasses.dataclass(frozen=True, eq=False)
class Estimate:
    """A number of clusters, and the curves behind it.

    Arguments
    ---------
    n_clusters : int
        The estimate.
    explained, by_chance : numpy.ndarray
        Share of the sum of squares that lies between 1, 2, … clusters of the
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
        """How much more is explained than by chance, at 1, 2, … clusters."""
        return self.explained - self.by_chance

    @property
    def is_guess(self) -> bool:
        """Says that clusters explain hardly more than chance."""
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
        Makes the parts to join where there are more embeddings than its
        clusters; its seed is that of the normal cloud.
    embeddings : numpy.ndarray
        Embeddings (N, D), of any length but 0.
    first, tree : Parts and Tree, optional
        What `parts` and `ward` made of the embeddings, where it is known.

    Returns
    -------
    Estimate
        Where the clusters explain hardly more than chance, it is a guess, at
        least a tenth of the number of embeddings or of the first step's
        clusters: `is_guess` says so.

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
    others = parts(kmeans, _normal_cloud(embeddings, kmeans.seed))
    by_chance = _explained(others, ward(others.means, others.sizes))
    n_parts = min(len(explained), len(by_chance))
    # k-means may drop an empty part; what both have is compared.
    check_enough(n_parts)
    explained, by_chance = explained[:n_parts], by_chance[:n_parts]
    gap = (explained - by_chance)[1 : n_parts // 2]
    doublings = np.log2(np.arange(2, 2 + len(gap)))
    value = gap - SLACK * gap.max() * doublings
    value[gap < (1 - SLACK) * gap.max()] = -np.inf
    found = Estimate(2 + int(np.argmax(value)), explained, by_chance)
    if found.is_guess:
        n_clusters = max(found.n_clusters, n_parts // GUESSED_SIZE)
        found = dataclasses.replace(found, n_clusters=n_clusters)
    return found


def check_enough(n_points: int) -> None:
    """Raises ValueError if there is too little to join for an estimate."""
    if n_points < 8:
        raise ValueError(
            f"{n_points} utterances, or clusters of the first step, are too "
            "few to estimate a number of clusters from: 8 are needed"
        )


def _explained(first, tree):
    """Returns the share of the sum of squares between 1, 2, … clusters."""
    within = first.within + tree.within()
    if not within[0] > 0:
        raise ValueError(
            "all embeddings are equal: they have no number of clusters"
        )
    return 1 - within / within[0]


def _normal_cloud(embeddings, seed):
    """Draws as many normal vectors of the unit embeddings' two moments."""
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
