"""Clustering without a threshold: the number with the best silhouette."""

import numpy as np
import torch

from lgl_plugin.clustering.vectors import largest_first
from lgl_plugin.clustering.ward import ward
from lgl_plugin.utils.progress import tqdm

# How many numbers of clusters are tried, in a geometric series from 2 to one
# fewer than there are points.
TRIED = 60
# Cosines of points with clusters that are in memory at once: 64 MiB.
COSINES = 2**24


def clearest_clusters(vectors: np.ndarray, device: str = "cpu") -> np.ndarray:
    """Joins by average linkage, down to the number with the best silhouette.

    There are at least 2 clusters, and at least one has 2 or more points,
    because the silhouette is not defined for a single cluster or for single
    points.

    Arguments
    ---------
    vectors : numpy.ndarray
        Unit vectors (N, D), float32, N from 3.
    device : str
        Device that computes cosines.

    Returns
    -------
    numpy.ndarray
        Cluster of each vector, int64 (N,), from 0, the largest first.

    Example
    -------
    >>> rng = np.random.default_rng(0)
    >>> points = np.repeat(np.eye(7), 5, axis=0)
    >>> points += 0.1 * rng.normal(size=points.shape)
    >>> points /= np.linalg.norm(points, axis=1, keepdims=True)
    >>> np.bincount(clearest_clusters(points.astype(np.float32)))
    array([5, 5, 5, 5, 5, 5, 5])
    """
    points = torch.from_numpy(vectors).to(device)
    tree = ward(points, torch.ones(len(points)), average=True)
    numbers = np.geomspace(2, len(vectors) - 1, TRIED).astype(int)
    best, labels = -np.inf, np.zeros(len(vectors), np.int64)
    for number in tqdm(np.unique(numbers), desc="numbers of groups", delay=1):
        tried = tree.cut(number)
        silhouette = silhouettes(vectors, tried).mean()
        if silhouette > best:
            best, labels = silhouette, tried
    return largest_first(labels)


def silhouettes(
    vectors: np.ndarray, labels: np.ndarray, alone: float = 1.0
) -> np.ndarray:
    """Returns the silhouette of each vector in its cluster, float32 (N,).

    The silhouette (Rousseeuw 1987) of the cosine distance, by average linkage,
    is (b - a) / max(a, b), from -1 to 1. a is the mean distance to the
    cluster's other members. b is the mean distance to the nearest other
    cluster, 1 if there is none.

    Arguments
    ---------
    vectors : numpy.ndarray
        Unit vectors (N, D), float32.
    labels : numpy.ndarray
        Their clusters, int64 (N,), from 0, none empty.
    alone : float
        Distance a of a vector that is alone in its cluster.

    Example
    -------
    >>> vectors = np.float32([[1, 0], [1, 0], [0, 1]])
    >>> silhouettes(vectors, np.array([0, 0, 1]), alone=0.5)
    array([1. , 1. , 0.5], dtype=float32)
    """
    sizes = np.bincount(labels).astype(np.float32)
    sums = np.zeros((len(sizes), vectors.shape[1]), np.float32)
    np.add.at(sums, labels, vectors)
    result = np.empty(len(vectors), np.float32)
    block = max(1, COSINES // len(sizes))
    for start in range(0, len(vectors), block):
        own = labels[start : start + block]
        rows = np.arange(len(own))
        cosines = vectors[start : start + block] @ sums.T
        # Minus the vector itself, whose cosine with itself is 1.
        others = np.maximum(sizes[own] - 1, 1)
        a = 1 - (cosines[rows, own] - 1) / others
        a[sizes[own] == 1] = alone
        cosines /= sizes
        cosines[rows, own] = -np.inf
        b = 1 - cosines.max(axis=1)
        b[np.isinf(b)] = 1.0  # there is no other cluster
        largest = np.maximum(np.maximum(a, b), 1e-6)
        result[start : start + block] = (b - a) / largest
    return result.clip(-1, 1)
