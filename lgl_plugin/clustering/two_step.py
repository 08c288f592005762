"""Two-step clustering: k-means to many clusters, then Ward's method.

k-means alone splits large speakers and joins small ones; many small clusters
do neither, and Ward's method puts them together.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from lgl_plugin.clustering.kmeans import Clustering, KMeans
from lgl_plugin.clustering.vectors import chunks, normalised, sum_by_label
from lgl_plugin.clustering.ward import ward


@dataclasses.dataclass(eq=False)
class TwoStepKMeans:
    """k-means to many clusters, then agglomerative clustering of these.

    Ward's method starts from the means of the k-means clusters with their
    sizes as weights, that is from the k-means partition, and joins at each
    step the two clusters that add least to the sum of squares. In the
    resulting `Clustering` the centroids are the means of the members at length
    1, so a label is not always that of the nearest centroid; the inertia is
    that of the k-means.

    Arguments
    ---------
    kmeans : KMeans
        First step; 50,000 clusters for VoxCeleb2's million utterances.
    n_clusters : int
        Clusters after the second step.

    Raises
    ------
    ValueError
        If `n_clusters` is below 1 or more than those of `kmeans`; in a call,
        as `kmeans` does.

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

    kmeans: KMeans
    n_clusters: int

    def __post_init__(self) -> None:
        n_clusters, most = self.n_clusters, self.kmeans.n_clusters
        if not 1 <= n_clusters <= most or n_clusters % 1:
            raise ValueError(
                f"n_clusters must be whole and from 1 to the {most} of the "
                f"first step, got {n_clusters}"
            )

    def check(self, n_embeddings: int) -> None:
        """Raises ValueError if the first step has more clusters than that."""
        self.kmeans.check(n_embeddings)

    def __call__(self, embeddings: np.ndarray) -> Clustering:
        """Clusters embeddings (N, D): an array, a list or a memory map."""
        embeddings = np.asarray(embeddings)
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


def _sums(embeddings, labels, n_labels):
    """Returns the sum of the normalised embeddings of each label."""
    sums = torch.zeros(n_labels, embeddings.shape[1])
    for rows in chunks(len(embeddings)):
        points = torch.from_numpy(normalised(embeddings[rows]))
        sums += sum_by_label(points, torch.from_numpy(labels[rows]), n_labels)
    return sums
