"""Agglomerative clustering by average cosine, cut at a threshold.

The number of clusters follows from the threshold and need not be known.
"""

import dataclasses

import numpy as np
import torch

from lgl_plugin.clustering.first_step import check_kmeans, parts, parts_of
from lgl_plugin.clustering.kmeans import Clustering, KMeans
from lgl_plugin.clustering.vectors import largest_first, normalised
from lgl_plugin.clustering.ward import ward


@dataclasses.dataclass(eq=False)
class AverageLinkage:
    """Agglomerative clustering by a threshold, for the yaml's `cluster`.

    The average cosine of two clusters is the mean over all pairs of their
    members, also if the members are clusters of the first step.

    Arguments
    ---------
    kmeans : KMeans
        First step, skipped if it has at least as many clusters as there are
        utterances.
    threshold : float
        Smallest average cosine at which two clusters are joined.

    Raises
    ------
    ValueError
        If `kmeans` is no KMeans, or the threshold is no cosine between -1 and
        1. A call raises what `kmeans` raises.

    Example
    -------
    >>> from lgl_plugin.clustering.kmeans import TorchKMeans
    >>> cluster = AverageLinkage(TorchKMeans(50_000), threshold=0.8)
    >>> found = cluster(np.float32([[1, 0], [0, 1], [5, 1], [0, 2]]))
    >>> found.labels.tolist(), found.n_clusters
    ([0, 1, 0, 1], 2)
    """

    kmeans: KMeans
    threshold: float

    def __post_init__(self) -> None:
        check_kmeans(self.kmeans)
        if not -1 < self.threshold < 1:
            raise ValueError(
                "threshold must be a cosine between -1 and 1, got "
                f"{self.threshold}"
            )

    def check(self, n_embeddings: int) -> None:
        """Accepts any number of embeddings; the first step is optional."""

    def __call__(self, embeddings: np.ndarray) -> Clustering:
        """Clusters embeddings (N, D): an array, a list or a memory map."""
        embeddings = np.asarray(embeddings)
        first = parts(self.kmeans, embeddings)
        labels = _join(first.means, first.sizes, self.threshold)[first.labels]
        result = parts_of(embeddings, labels, "cpu")
        return Clustering(
            labels=labels,
            centroids=normalised(result.means.numpy()),
            inertia=np.array([result.within]),
            n_clusters=len(result.sizes),
            points_used=len(embeddings),
        )


def average_linkage(
    embeddings: np.ndarray, threshold: float, device: str = "cpu"
) -> np.ndarray:
    """Joins embeddings while the average cosine of two clusters is high.

    Unweighted average linkage (UPGMA). The average over all pairs of two
    clusters is the product of the means of their unit vectors, so that no
    matrix of pairs is kept: memory grows with N. 20,000 embeddings took 20 s
    on one CPU core.

    Arguments
    ---------
    embeddings : numpy.ndarray
        Embeddings (N, D), of any length but 0.
    threshold : float
        Smallest average cosine at which two clusters are joined.
    device : str
        Device that computes cosines.

    Returns
    -------
    numpy.ndarray
        Cluster of each embedding, int64 (N,), from 0, the largest first.

    Example
    -------
    >>> embeddings = np.float32([[1, 0], [0, 1], [5, 1], [0, 2]])
    >>> average_linkage(embeddings, threshold=0.8).tolist()
    [0, 1, 0, 1]
    """
    means = torch.from_numpy(normalised(np.asarray(embeddings))).to(device)
    return _join(means, torch.ones(len(means)), threshold)


def _join(means, sizes, threshold):
    """Joins clusters by their means (N, D) and sizes (N,); returns labels."""
    tree = ward(means, sizes, average=True, limit=1 - threshold)
    labels = tree.cut(len(means) - len(tree.joins))
    return largest_first(labels, sizes.cpu().numpy())
