"""Pseudo-labels from embeddings: spherical k-means by faiss.

Arrays in, arrays out: who the embeddings belong to and where the labels are
kept is for others to know.
"""

import dataclasses
import importlib

import numpy as np
import torch
from sklearn.cluster import kmeans_plusplus
from tqdm import tqdm

# Rows that are normalised and assigned at once: 50 MB at 192 dimensions.
CHUNK = 65536


@dataclasses.dataclass(frozen=True)
class Clustering:
    """What k-means found.

    Arguments
    ---------
    labels : numpy.ndarray
        Cluster of each embedding (N,), int64, in [0, n_clusters).
    centroids : numpy.ndarray
        Centroids (n_clusters, D), float32, of length 1. Each embedding has
        the label of the centroid with the highest cosine.
    inertia : numpy.ndarray
        Sum of squared distances of the points used to their centroids, at
        the start of each iteration: (n_iterations,), float64.
    n_clusters : int
        Clusters that have a member.
    n_empty : int
        Clusters asked for that ended without a member and were dropped.
    points_used : int
        Embeddings that the centroids were trained on; all N were assigned.
    """

    labels: np.ndarray
    centroids: np.ndarray
    inertia: np.ndarray
    n_clusters: int
    n_empty: int
    points_used: int


def require_faiss(device="cpu"):
    """Imports faiss, or says how to install it.

    Arguments
    ---------
    device : str
        Where the clustering is to run: "cpu", "cuda" or "cuda:<index>".

    Returns
    -------
    module

    Raises
    ------
    ImportError
        If faiss is missing, or has no GPU support where `device` needs it.
    ValueError
        If faiss does not see that GPU.

    Example
    -------
    >>> require_faiss().__name__
    'faiss'
    """
    device = torch.device(device)
    extra = "cpu" if device.type == "cpu" else "gpu"
    command = f'pip install "lgl-plugin[{extra}]"'
    try:
        faiss = importlib.import_module("faiss")
    except ImportError as error:
        raise ImportError(
            f"clustering needs faiss, which does not import ({error}); "
            f"install it with: {command}"
        ) from error
    if device.type != "cpu":
        if not hasattr(faiss, "StandardGpuResources"):
            raise ImportError(
                f"clustering on {device} needs faiss with GPU support and "
                "the installed one has none; replace it: "
                f"pip uninstall faiss-cpu && {command}"
            )
        if (device.index or 0) >= faiss.get_num_gpus():
            raise ValueError(
                f"clustering on {device}: faiss sees "
                f"{faiss.get_num_gpus()} GPU(s); choose another device or "
                "cluster with device: cpu"
            )
    return faiss


class FaissKMeans:
    """Spherical k-means: cosine is the metric in training and assignment.

    The embeddings are L2-normalised, and so is each centroid after each
    iteration. (The released code searches by inner product among centroids
    that are not, which favours long ones: the compact clusters.) Same
    seed, same labels, on one machine.

    Arguments
    ---------
    n_clusters : int
        K; 6,000 for VoxCeleb2 (paper, section 4).
    n_iterations : int
        Iterations of Lloyd's algorithm. 25 is the default of faiss, which
        the paper used; on simulated speakers, overlapping or not, the
        inertia by then falls by less than 0.1 % an iteration.
    n_redo : int
        Runs from different first centroids, of which the one with the
        lowest inertia is kept. Worth its time on small corpora.
    max_points_per_centroid : int
        Trains on a random sample of K times as many, where there are more
        embeddings. 256 is the default of faiss: at K=6,000 that is
        1,536,000, more than VoxCeleb2 has, so all are used.
    seed : int
        Of the sample and of the first centroids.
    device : str
        "cpu", "cuda" or "cuda:<index>". The number of CPU threads is that
        of OpenMP (OMP_NUM_THREADS).

    Raises
    ------
    ImportError, ValueError
        From `require_faiss`; ValueError also if a number is below 1.

    Example
    -------
    >>> rng = np.random.default_rng(0)
    >>> embeddings = np.repeat(np.eye(3), 50, axis=0)
    >>> embeddings += rng.normal(scale=0.05, size=embeddings.shape)
    >>> clustering = FaissKMeans(n_clusters=3, n_redo=5)(embeddings)
    >>> np.bincount(clustering.labels).tolist()
    [50, 50, 50]
    """

    def __init__(
        self,
        n_clusters,
        n_iterations=25,
        n_redo=1,
        max_points_per_centroid=256,
        seed=0,
        device="cpu",
    ):
        for name, value in {
            "n_clusters": n_clusters,
            "n_iterations": n_iterations,
            "n_redo": n_redo,
            "max_points_per_centroid": max_points_per_centroid,
        }.items():
            if not value >= 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.faiss = require_faiss(device)
        self.n_clusters = n_clusters
        self.n_iterations = n_iterations
        self.n_redo = n_redo
        self.max_points_per_centroid = max_points_per_centroid
        self.seed = seed
        self.device = torch.device(device)

    def check(self, n_embeddings):
        """Whether so many embeddings can be clustered; callable long before.

        Arguments
        ---------
        n_embeddings : int
            Number of utterances.

        Raises
        ------
        ValueError
            If K is larger.
        """
        if self.n_clusters > n_embeddings:
            raise ValueError(
                f"n_clusters={self.n_clusters} is more than the "
                f"{n_embeddings} utterances to cluster; lower n_clusters"
            )

    def __call__(self, embeddings):
        """Clusters.

        Arguments
        ---------
        embeddings : numpy.ndarray
            Embeddings (N, D), of any length but 0. A memory map will do: it
            is never copied whole unless all of it is trained on.

        Returns
        -------
        Clustering

        Raises
        ------
        ValueError
            If K is larger than N, or an embedding is NaN, infinite or zero.
        """
        if embeddings.ndim != 2:
            raise ValueError(
                "embeddings must be (utterances, dimensions), got shape "
                f"{embeddings.shape}"
            )
        n = len(embeddings)
        self.check(n)
        _check_directions(embeddings)
        points_used = min(n, self.n_clusters * self.max_points_per_centroid)
        if points_used < n:
            rng = np.random.default_rng(self.seed)
            rows = np.sort(rng.choice(n, points_used, replace=False))
            points = _normalised(embeddings[rows])
        else:
            points = _normalised(embeddings)
        centroids, inertia = self._train(points)
        labels = self._assign(embeddings, centroids)
        present, labels = np.unique(labels, return_inverse=True)
        return Clustering(
            labels=labels.astype(np.int64),
            centroids=centroids[present],
            inertia=inertia,
            n_clusters=len(present),
            n_empty=self.n_clusters - len(present),
            points_used=points_used,
        )

    def _train(self, points):
        """The best centroids of all runs, and their inertia curve."""
        if len(points) == self.n_clusters:
            return points, np.zeros(self.n_iterations)
        best = None
        with tqdm(
            total=self.n_redo * self.n_iterations,
            desc=f"k-means, K={self.n_clusters}",
            unit="iteration",
        ) as progress:
            for seed in range(self.seed, self.seed + self.n_redo):
                centroids = self._first_centroids(points, seed)
                kmeans = self.faiss.Kmeans(
                    points.shape[1],
                    self.n_clusters,
                    niter=1,  # at a time, for the progress bar
                    spherical=True,
                    # The sample is ours, and warnings of less than 39 points
                    # per centroid would come once per iteration.
                    min_points_per_centroid=1,
                    max_points_per_centroid=len(points),
                )
                kmeans.index = self._index(points.shape[1])
                inertia = np.empty(self.n_iterations)
                for iteration in range(self.n_iterations):
                    kmeans.train(points, init_centroids=centroids)
                    centroids = kmeans.centroids
                    # faiss sums cosines; |x - c|^2 = 2 - 2 cos.
                    inertia[iteration] = 2 * (len(points) - kmeans.obj[0])
                    progress.update()
                if best is None or inertia[-1] < best[1][-1]:
                    best = centroids, inertia
        return best

    def _first_centroids(self, points, seed):
        """Greedy k-means++ on at most ten points per centroid.

        faiss starts from random points, which leaves speakers that are well
        apart without a centroid of their own, and others with two. Few
        points do: all of them would take longer than the iterations.
        """
        rng = np.random.default_rng(seed)
        size = min(len(points), 10 * self.n_clusters)
        rows = rng.choice(len(points), size, replace=False)
        return kmeans_plusplus(
            points[rows], self.n_clusters, random_state=seed
        )[0]

    def _assign(self, embeddings, centroids):
        index = self._index(centroids.shape[1])
        index.add(centroids)
        labels = np.empty(len(embeddings), dtype=np.int64)
        with tqdm(
            total=len(embeddings),
            desc="assigning",
            unit="utterance",
            unit_scale=True,
        ) as progress:
            for start in range(0, len(embeddings), CHUNK):
                chunk = _normalised(embeddings[start : start + CHUNK])
                nearest = index.search(chunk, 1)[1][:, 0]
                labels[start : start + CHUNK] = nearest
                progress.update(len(chunk))
        return labels

    def _index(self, dimensions):
        index = self.faiss.IndexFlatIP(dimensions)
        if self.device.type == "cpu":
            return index
        return self.faiss.index_cpu_to_gpu(
            self.faiss.StandardGpuResources(), self.device.index or 0, index
        )


def _normalised(embeddings):
    points = np.array(embeddings, dtype=np.float32, order="C")
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    return points


def _check_directions(embeddings):
    """Refuses what has no direction, before any work and by its row."""
    norms = np.empty(len(embeddings), dtype=np.float32)
    for start in range(0, len(embeddings), CHUNK):
        chunk = np.asarray(embeddings[start : start + CHUNK], np.float32)
        norms[start : start + CHUNK] = np.linalg.norm(chunk, axis=1)
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(embeddings)} embeddings are NaN, infinite or "
            f"zero, the first at row {bad[0]}: the encoder may have diverged, "
            "or its input is broken there"
        )
