"""Two-step clustering: k-means to many centroids, then Ward's method.

k-means alone splits large speakers and joins small ones; many small clusters
do neither, and Ward's method puts them together.
"""

import dataclasses

import numpy as np
import torch
from scipy import sparse
from tqdm import tqdm

from lgl_plugin.clustering.kmeans import (
    CHUNK,
    exact_matmul,
    normalised,
    sum_by_label,
)

# Distances held at once, in bytes: a share of a CPU's last-level cache, and
# on a GPU enough to keep it busy.
DISTANCES = {"cpu": 16 * 2**20, "cuda": 2**30}


class TwoStepKMeans:
    """k-means to many clusters, then agglomerative clustering of these.

    Ward's method starts from the means of the k-means clusters with their
    sizes as weights, that is from the k-means partition, and joins at each
    step the two clusters that add least to the sum of squares.

    Arguments
    ---------
    kmeans : KMeans
        The first step; 50,000 clusters for VoxCeleb2's million utterances.
    n_clusters : int
        Clusters after the second step.

    Raises
    ------
    ValueError
        If `n_clusters` is below 1 or more than those of `kmeans`.

    Example
    -------
    >>> from lgl_plugin.clustering.kmeans import TorchKMeans
    >>> rng = np.random.default_rng(0)
    >>> embeddings = np.repeat(np.eye(3), 50, axis=0)
    >>> embeddings += rng.normal(scale=0.05, size=embeddings.shape)
    >>> cluster = TwoStepKMeans(TorchKMeans(n_clusters=20), n_clusters=3)
    >>> np.bincount(cluster(embeddings).labels).tolist()
    [50, 50, 50]
    """

    def __init__(self, kmeans, n_clusters):
        if not 1 <= n_clusters <= kmeans.n_clusters:
            raise ValueError(
                f"n_clusters must be from 1 to the {kmeans.n_clusters} of "
                f"the first step, got {n_clusters}"
            )
        self.kmeans = kmeans
        self.n_clusters = n_clusters

    def check(self, n_embeddings):
        """Whether so many embeddings can be clustered; callable long before.

        Arguments
        ---------
        n_embeddings : int
            Number of utterances.

        Raises
        ------
        ValueError
            If the first step has more clusters.
        """
        self.kmeans.check(n_embeddings)

    def __call__(self, embeddings):
        """Clusters.

        Arguments
        ---------
        embeddings : numpy.ndarray
            Embeddings (N, D), of any length but 0, or a memory map.

        Returns
        -------
        Clustering
            Its centroids are the means of the members, at length 1. Unlike
            those of k-means its labels are not always that of the nearest
            centroid. The inertia is that of the first step.

        Raises
        ------
        ValueError
            If the first step has more clusters than there are embeddings,
            or an embedding is NaN, infinite or zero.
        """
        first = self.kmeans(embeddings)
        n_clusters = min(self.n_clusters, first.n_clusters)
        sizes = torch.from_numpy(np.bincount(first.labels))
        sums = _sums(embeddings, first.labels, first.n_clusters)
        merged = ward(
            (sums / sizes[:, None]).to(self.kmeans.device), sizes, n_clusters
        ).cpu()
        centroids = sum_by_label(sums, merged, n_clusters)
        return dataclasses.replace(
            first,
            labels=merged.numpy()[first.labels],
            centroids=normalised(centroids.numpy()),
            n_clusters=n_clusters,
            n_empty=self.n_clusters - n_clusters,
        )


def ward(points, weights, n_clusters):
    """Ward's agglomerative clustering of weighted points.

    Each round joins all pairs that are each other's nearest neighbours. For
    Ward's distance a union is no nearer to a third cluster than the nearer
    of its parts was, so this finds the same joins as one at a time, in
    another order; sorted by distance, the first N - n_clusters of them are
    the result. The same property says whose neighbours must be looked up
    again: those whose neighbour was joined. Distances are computed in blocks
    and never kept.

    Arguments
    ---------
    points : torch.Tensor
        Points (N, D), float32 or float64, on any device.
    weights : torch.Tensor
        Weight of each point (N,), above 0: w is worth w equal points.
    n_clusters : int
        Clusters to leave, from 1 to N.

    Returns
    -------
    torch.Tensor
        Cluster of each point (N,), int64, in [0, n_clusters), on the device
        of the points.

    Example
    -------
    >>> points = torch.tensor([[0.0], [4.0], [1.0], [5.5]])
    >>> ward(points, torch.ones(4), 2).tolist()
    [0, 1, 0, 1]
    """
    if n_clusters == len(points):
        return torch.arange(n_clusters, device=points.device)
    means, weights = points, weights.to(points, copy=True)
    names = torch.arange(len(points), device=points.device)
    heights = torch.zeros_like(weights)  # of the last join in each cluster
    nearest, gaps = torch.zeros_like(names), torch.zeros_like(weights)
    stale = names
    joins = []  # of each round: names kept, names dropped, heights
    n_joins = len(points) - n_clusters
    n_sure = 0  # joins that are lower than all to come
    with exact_matmul(), tqdm(total=n_joins, desc="Ward", unit="join") as bar:
        while True:
            nearest[stale], gaps[stale] = _neighbours(means, weights, stale)
            lowest = gaps.min()
            sure = sum(int((height <= lowest).sum()) for *_, height in joins)
            bar.update(min(sure, n_joins) - n_sure)
            n_sure = min(sure, n_joins)
            if n_sure == n_joins:
                break

            order = torch.arange(len(nearest), device=points.device)
            mutual = (nearest[nearest] == order) & (order < nearest)
            kept = mutual.nonzero()[:, 0]
            if len(kept) == 0:  # a circle of neighbours, equal but for rounding
                kept = gaps.argmin().view(1)
            dropped = nearest[kept]
            height = gaps[kept].maximum(heights[kept]).maximum(heights[dropped])
            joins.append((names[kept], names[dropped], height))

            weight = weights[kept] + weights[dropped]
            share = (weights[dropped] / weight)[:, None]
            means = means.index_copy(
                0, kept, means[kept].lerp(means[dropped], share)
            )
            weights[kept], heights[kept] = weight, height
            joined = torch.zeros_like(mutual)
            joined[kept] = joined[dropped] = True
            left = torch.ones_like(mutual)
            left[dropped] = False
            stale = (joined | joined[nearest])[left].nonzero()[:, 0]
            nearest = (left.cumsum(dim=0) - 1)[nearest]
            means, weights, heights, names, nearest, gaps = (
                of_each[left]
                for of_each in (means, weights, heights, names, nearest, gaps)
            )
    kept, dropped, height = (torch.cat(parts) for parts in zip(*joins))
    first = height.argsort(stable=True)[:n_joins].cpu()
    joined = sparse.coo_matrix(
        (np.ones(n_joins), (kept.cpu()[first], dropped.cpu()[first])),
        shape=(len(points), len(points)),
    )
    labels = sparse.csgraph.connected_components(joined, directed=False)[1]
    return torch.from_numpy(labels).to(points.device, torch.int64)


def _neighbours(means, weights, rows):
    """Nearest cluster of some, by Ward's distance, and that distance."""
    block = max(1, DISTANCES[means.device.type] // (8 * len(means)))
    block = min(block, len(rows))
    squares = (means**2).sum(dim=1)
    inverse = 1 / weights
    nearest, closest = torch.empty_like(rows), means.new_empty(len(rows))
    # Memory taken afresh for each block would cost as much as the products.
    buffers = means.new_empty(2, block, len(means))
    for start in range(0, len(rows), block):
        now = slice(start, start + block)
        some = rows[now]
        gaps, scales = buffers[:, : len(some)]
        torch.addmm(squares, means[some], means.T, alpha=-2, out=gaps)
        gaps += squares[some, None]
        gaps /= torch.add(inverse[some, None], inverse, out=scales)
        gaps.scatter_(1, some[:, None], torch.inf)
        torch.min(gaps, dim=1, out=(closest[now], nearest[now]))
    return nearest, closest


def _sums(embeddings, labels, n_labels):
    """Sum of the normalised embeddings of each label."""
    labels = torch.from_numpy(labels)
    sums = torch.zeros(n_labels, embeddings.shape[1])
    for start in range(0, len(embeddings), CHUNK):
        rows = slice(start, start + CHUNK)
        points = torch.from_numpy(normalised(embeddings[rows]))
        sums += sum_by_label(points, labels[rows], n_labels)
    return sums
