"""Agglomerative clustering by average cosine, cut at a threshold.

The number of clusters follows from the threshold and need not be known.
"""

import dataclasses

import numpy as np
import torch

from lgl_plugin.clustering.first_step import means_of, parts
from lgl_plugin.clustering.kmeans import Clustering, KMeans
from lgl_plugin.clustering.vectors import exact_matmul, normalised

# Cosines held at once, in bytes. Each block reads all means again: smaller ones
# were slower on a CPU.
COSINES = {"cpu": 64 * 2**20, "cuda": 2**30}


@dataclasses.dataclass(eq=False)
class AverageLinkage:
    """Agglomerative clustering by a threshold, for the yaml's `cluster`.

    The average cosine of two clusters is that of all pairs of their members,
    also where these are clusters of the first step.

    Arguments
    ---------
    kmeans : KMeans
        First step, skipped where it has at least as many clusters as there
        are utterances.
    threshold : float
        Average cosine from which on two clusters are one.

    Raises
    ------
    ValueError
        If the threshold is no cosine between -1 and 1; in a call, as
        `kmeans` does.

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
        if not -1 < self.threshold < 1:
            raise ValueError(
                "threshold must be a cosine between -1 and 1, got "
                f"{self.threshold}"
            )

    def check(self, n_embeddings: int) -> None:
        """Accepts any number of embeddings: a first step is made to fit."""

    def __call__(self, embeddings: np.ndarray) -> Clustering:
        """Clusters embeddings (N, D): an array, a list or a memory map."""
        embeddings = np.asarray(embeddings)
        first = parts(self.kmeans, embeddings)
        labels = _join(first.means, first.sizes, self.threshold)[first.labels]
        means, sizes = means_of(embeddings, labels)
        squares = (sizes * means.double().square().sum(dim=1)).sum()
        return Clustering(
            labels=labels,
            centroids=normalised(means.numpy()),
            inertia=np.array([len(labels) - float(squares)]),
            n_clusters=len(sizes),
            n_empty=0,
            points_used=len(embeddings),
        )


def average_linkage(
    embeddings: np.ndarray, threshold: float, device: str = "cpu"
) -> np.ndarray:
    """Joins embeddings while the average cosine of two clusters is high.

    Unweighted average linkage (UPGMA). The average over all pairs of two
    clusters is the product of the means of their unit vectors, so that no
    matrix of pairs is kept: memory grows with N. Average linkage is
    reducible, so each round joins all reciprocal nearest neighbours (Murtagh
    1983) and the result is that of one join at a time. 20,000 embeddings took
    20 s on one CPU core.

    Arguments
    ---------
    embeddings : numpy.ndarray
        Embeddings (N, D), of any length but 0.
    threshold : float
        Average cosine from which on two clusters are one.
    device : str
        Where cosines are computed.

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
    means, sizes = means.clone(), sizes.to(means, copy=True)
    weights, device = sizes.clone(), means.device
    # The cluster that each of them is in, as a row of `means`.
    member_of = torch.arange(len(means), device=device)
    nearest = torch.zeros_like(member_of)
    cosines = torch.zeros_like(sizes)
    stale = member_of  # clusters whose nearest neighbour must be looked up
    with exact_matmul():
        while len(means) > 1:
            nearest[stale], cosines[stale] = _neighbours(means, stale)
            if cosines.max() < threshold:
                break
            order = torch.arange(len(means), device=device)
            mutual = (nearest[nearest] == order) & (order < nearest)
            kept = (mutual & (cosines >= threshold)).nonzero()[:, 0]
            # Rounding can make equal cosines a circle of neighbours with no
            # mutual pair, and the loop would never end: join the nearest.
            if len(kept) == 0:
                kept = cosines.argmax().view(1)
            dropped = nearest[kept]
            size = sizes[kept] + sizes[dropped]
            share = (sizes[dropped] / size)[:, None]
            means[kept] = means[kept].lerp(means[dropped], share)
            sizes[kept] = size
            into = order.clone()
            into[dropped] = kept
            # By reducibility a neighbour changes only if it was joined.
            joined = torch.zeros_like(mutual)
            joined[kept] = joined[dropped] = True
            left = torch.ones_like(mutual)
            left[dropped] = False
            stale = (joined | joined[nearest])[left].nonzero()[:, 0]
            place = left.cumsum(dim=0) - 1
            member_of = place[into[member_of]]
            nearest = place[into[nearest]]
            means, sizes, nearest, cosines = (
                of_each[left] for of_each in (means, sizes, nearest, cosines)
            )
    labels = member_of.cpu().numpy()
    members = np.bincount(labels, weights.cpu().numpy())
    largest_first = np.argsort(-members, kind="stable")
    return np.argsort(largest_first)[labels]


def _neighbours(means, rows):
    """Returns the nearest other cluster of rows, and its average cosine."""
    block = max(1, COSINES[means.device.type] // (4 * len(means)))
    nearest, closest = torch.empty_like(rows), means.new_empty(len(rows))
    # One buffer: allocation per block would cost as much as the products.
    buffer = means.new_empty(min(block, len(rows)), len(means))
    for start in range(0, len(rows), block):
        now = slice(start, start + block)
        some = rows[now]
        cosines = torch.mm(means[some], means.T, out=buffer[: len(some)])
        cosines.scatter_(1, some[:, None], -torch.inf)  # not its own
        torch.max(cosines, dim=1, out=(closest[now], nearest[now]))
    return nearest, closest
