"""Two-step clustering: k-means to many clusters, then Ward's method.

k-means alone splits large speakers and joins small ones. Many small clusters do
neither, and Ward's method joins them to speakers. If there are few enough
utterances, Ward's method starts from the utterances.
"""

import dataclasses
from typing import Literal

import numpy as np

from lgl_plugin.clustering.first_step import check_kmeans, means_of, parts
from lgl_plugin.clustering.kmeans import Clustering, KMeans
from lgl_plugin.clustering.number import check_enough, estimate
from lgl_plugin.clustering.vectors import check_number, normalised
from lgl_plugin.clustering.ward import ward


@dataclasses.dataclass(eq=False)
class TwoStepKMeans:
    """k-means to many clusters, then agglomerative clustering of these.

    Ward's method starts from the means of the k-means clusters with their sizes
    as weights. At each step it joins the two clusters that add least to the sum
    of squares. In the resulting `Clustering` the centroids are the means of the
    members at length 1, so a label is not always that of the nearest centroid.
    The inertia is a single value, the sum of squared distances to the means of
    the result.

    Arguments
    ---------
    kmeans : KMeans
        First step, skipped if it has at least as many clusters as there are
        utterances. Its number of clusters only matters for time and memory:
        with 50,000, two minutes of a CPU core and VoxCeleb2's million
        utterances on a GPU.
    n_clusters : int or "auto"
        Clusters after the second step; "auto" estimates the number
        (`clustering.number.estimate`).

    Raises
    ------
    ValueError
        If `kmeans` is no KMeans, or `n_clusters` is below 1 or above its number
        of clusters. A call raises what `kmeans` and
        `clustering.number.estimate` raise.

    Example
    -------
    >>> from lgl_plugin.clustering.kmeans import TorchKMeans
    >>> rng = np.random.default_rng(0)
    >>> embeddings = np.repeat(np.eye(3), 50, axis=0)
    >>> embeddings += rng.normal(scale=0.05, size=embeddings.shape)
    >>> cluster = TwoStepKMeans(TorchKMeans(50_000), n_clusters="auto")
    >>> np.bincount(cluster(embeddings).labels).tolist()
    [50, 50, 50]
    """

    kmeans: KMeans
    n_clusters: int | Literal["auto"]

    def __post_init__(self) -> None:
        check_kmeans(self.kmeans)
        n_clusters, most = self.n_clusters, self.kmeans.n_clusters
        if n_clusters == "auto":
            return
        if (
            not isinstance(n_clusters, int | np.integer)
            or not 1 <= n_clusters <= most
        ):
            raise ValueError(
                f"n_clusters must be auto, or whole and from 1 to the {most} "
                f"of the first step, got {n_clusters}"
            )

    def check(self, n_embeddings: int) -> None:
        """Raises ValueError if there are too few embeddings."""
        if self.n_clusters == "auto":
            check_enough(min(n_embeddings, self.kmeans.n_clusters))
        else:
            check_number(self.n_clusters, n_embeddings)

    def __call__(self, embeddings: np.ndarray) -> Clustering:
        """Clusters embeddings (N, D): an array, a list or a memory map."""
        embeddings = np.asarray(embeddings)
        self.check(len(embeddings))
        first = parts(self.kmeans, embeddings)
        tree = ward(first.means, first.sizes)
        n_clusters = self.n_clusters
        if n_clusters == "auto":
            result = estimate(self.kmeans, embeddings, first, tree)
            result.warn_of_guess()
            n_clusters = result.n_clusters
        n_clusters = min(n_clusters, len(first.sizes))
        labels = tree.cut(n_clusters)[first.labels]
        inertia = first.within + tree.within()[n_clusters - 1]
        return Clustering(
            labels=labels,
            centroids=normalised(means_of(embeddings, labels)[0].numpy()),
            inertia=np.array([inertia]),
            n_clusters=n_clusters,
            points_used=len(embeddings),
        )
