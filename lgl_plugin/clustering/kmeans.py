"""Pseudo-labels from embeddings: spherical k-means by faiss or by torch."""

import abc
import contextlib
import dataclasses
import importlib
from types import ModuleType
from typing import Any

import numpy as np
import torch

from lgl_plugin.clustering.kmeans_plus_plus import draw, kmeans_plus_plus
from lgl_plugin.clustering.vectors import (
    check_embeddings,
    check_number,
    chunks,
    exact_matmul,
    normalised,
    sum_by_label,
)
from lgl_plugin.utils.progress import tqdm

# Memory of the cosines that `TorchKMeans` computes at once, in bytes: a share
# of a CPU's last-level cache; on a GPU enough to keep it busy.
SCORES = {"cpu": 8 * 2**20, "cuda": 2**30}


@dataclasses.dataclass(frozen=True, eq=False)
class Clustering:
    """A partition of embeddings into clusters.

    Arguments
    ---------
    labels : numpy.ndarray
        Cluster of each embedding (N,), int64, in [0, n_clusters).
    centroids : numpy.ndarray
        Centroids (n_clusters, D), float32, of length 1. From k-means alone,
        an embedding's label is that of the nearest centroid.
    inertia : numpy.ndarray
        Sum of squared distances of the points used to their centroids, float64.
        From k-means: at the start of each iteration, (n_iterations,). From
        agglomerative clustering: to the means of the result, (1,).
    n_clusters : int
        Number of clusters with a member; clusters without a member were
        dropped.
    points_used : int
        Embeddings that the centroids were trained on; all N were assigned.

    Example
    -------
    >>> points = np.float32([[1, 0], [5, 1], [0, 1], [1, 5]])
    >>> clustering = TorchKMeans(n_clusters=2)(points)
    >>> a, b, c, d = clustering.labels.tolist()
    >>> a == b != c == d, clustering.centroids.shape, clustering.points_used
    (True, (2, 2), 4)
    """

    labels: np.ndarray
    centroids: np.ndarray
    inertia: np.ndarray
    n_clusters: int
    points_used: int


@dataclasses.dataclass(eq=False)
class KMeans(abc.ABC):
    """Spherical k-means: cosine is the metric in training and assignment.

    Maps embeddings (N, D), of any length but 0, to a `Clustering`. Embeddings
    are an array, a list or a memory map. A memory map is copied whole only if
    all of it is trained on. This is the base of `FaissKMeans` and
    `TorchKMeans`. A back-end of your own implements `_check_device`, `_iterate`
    and `_search`, and `_to_device` if its points do not stay in numpy.

    Embeddings and, after each iteration, centroids have length 1. (In the
    released code centroids do not. Its search by inner product favours long
    centroids, that is compact clusters.) The same seed gives the same labels on
    one machine.

    Arguments
    ---------
    n_clusters : int
        K; 6,000 for VoxCeleb2 (paper, section 4).
    n_iterations : int
        Iterations of Lloyd's algorithm. By 25, the default of faiss and so of
        the paper, the inertia falls by less than 0.1 % an iteration.
    max_points_per_centroid : int
        Largest sample to train on, in embeddings per cluster. At 256, the
        default of faiss, and K=6,000 all of VoxCeleb2 is used.
    seed : int
        Seed of the sample and of the first centroids.
    device : str
        "cpu" (with OMP_NUM_THREADS threads), "cuda", "cuda:<index>", or
        "auto": a GPU if torch sees one, otherwise the CPU.

    Raises
    ------
    ValueError
        If a number is below 1; in a call, if K is larger than N or an
        embedding is NaN, infinite or zero.

    Example
    -------
    >>> TorchKMeans(n_clusters=6000).check(n_embeddings=100)
    Traceback (most recent call last):
    ValueError: n_clusters=6000 is more than the 100 utterances to cluster...
    """

    n_clusters: int
    n_iterations: int = 25
    max_points_per_centroid: int = 256
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        numbers = ("n_clusters", "n_iterations", "max_points_per_centroid")
        for name in numbers:
            value = getattr(self, name)
            if value == "auto":
                raise ValueError(
                    f"{name}: auto is for TwoStepKMeans, whose second step "
                    "tells the number; k-means must be given one"
                )
            if not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(
                    f"{name} must be an integer of at least 1, got {value}"
                )
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._check_device(torch.device(self.device))

    def check(self, n_embeddings: int) -> None:
        """Raises ValueError if K is larger than the number of embeddings."""
        check_number(self.n_clusters, n_embeddings)

    def __call__(self, embeddings: np.ndarray) -> Clustering:
        """Clusters embeddings (N, D)."""
        embeddings = np.asarray(embeddings)
        with exact_matmul(), self._resources():
            points = self._training_points(embeddings)
            centroids, inertia = self._train(points)
            labels = self._assign(embeddings, centroids)
        present, labels = np.unique(labels, return_inverse=True)
        return Clustering(
            labels=labels.astype(np.int64),
            centroids=centroids[present],
            inertia=inertia,
            n_clusters=len(present),
            points_used=len(points),
        )

    def _training_points(self, embeddings):
        """Returns the normalised sample to train on; ValueError if unusable."""
        n = len(embeddings)
        self.check(n)
        check_embeddings(embeddings)
        size = self.n_clusters * self.max_points_per_centroid
        if size < n:
            rng = np.random.default_rng(self.seed)
            # Ascending order reads a memory map forwards.
            rows = np.sort(rng.choice(n, size, replace=False))
            embeddings = embeddings[rows]
        return normalised(embeddings)

    def _train(self, points):
        """Returns the centroids and the inertia after each iteration."""
        placed = self._to_device(points)
        first = self._first_centroids(points)
        centroids, inertia = self._to_device(first), np.zeros(self.n_iterations)
        if self.n_clusters == len(points):  # a cluster for each point
            return first, inertia
        for iteration in tqdm(
            range(self.n_iterations),
            desc=f"k-means, K={self.n_clusters}",
            unit="iteration",
        ):
            centroids, inertia[iteration] = self._iterate(placed, centroids)
        return torch.as_tensor(centroids).cpu().numpy(), inertia

    def _first_centroids(self, points):
        """Returns greedy k-means++ on at most ten points per centroid."""
        # Random points, with which faiss starts, leave some well-separated
        # speakers without a centroid and give others two. On all points the
        # search would take longer than the iterations.
        rng = np.random.default_rng(self.seed)
        size = min(len(points), 10 * self.n_clusters)
        rows = rng.choice(len(points), size, replace=False)
        sample = torch.from_numpy(points[rows]).to(self.device)
        seeds = kmeans_plus_plus(sample, self.n_clusters, self.seed)
        return points[rows[seeds.numpy()]]

    def _assign(self, embeddings, centroids):
        """Returns the label (N,) of the nearest centroid, chunk by chunk."""
        rows = list(chunks(len(embeddings)))
        return np.concatenate(
            [
                self._search(normalised(embeddings[block]), centroids)
                for block in tqdm(rows, desc="assigning", unit="chunk")
            ]
        )

    def _resources(self) -> contextlib.AbstractContextManager[object]:
        """Returns a context that holds resources of the back-end."""
        return contextlib.nullcontext()

    def _to_device(self, points: np.ndarray) -> Any:
        """Returns the array in the form and place that `_iterate` works on."""
        return points

    @abc.abstractmethod
    def _check_device(self, device: torch.device) -> None:
        """Raises if the back-end's library cannot compute on the device."""

    @abc.abstractmethod
    def _iterate(self, points: Any, centroids: Any) -> tuple[Any, float]:
        """Returns new centroids and the inertia of the given ones."""

    @abc.abstractmethod
    def _search(self, points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
        """Returns the number (N,) of each point's nearest centroid."""


class FaissKMeans(KMeans):
    """Spherical k-means by faiss, with the arguments of `KMeans`.

    Raises
    ------
    ImportError, ValueError
        If faiss is missing or has no GPU support although `device` needs it; if
        faiss does not see the GPU.

    Example
    -------
    >>> clustering = FaissKMeans(n_clusters=3)(np.repeat(np.eye(3), 50, axis=0))
    >>> np.bincount(clustering.labels).tolist()
    [50, 50, 50]
    """

    # Exists during a call only: faiss's resources cannot be copied or pickled,
    # and take 1.5 GB of the GPU memory that training needs.
    _gpu = None

    def _check_device(self, device):
        require_faiss(device)

    @contextlib.contextmanager
    def _resources(self):
        if torch.device(self.device).type != "cpu":
            self._gpu = require_faiss(self.device).StandardGpuResources()
        try:
            yield
        finally:
            self._gpu = None

    def _iterate(self, points, centroids):
        kmeans = require_faiss(self.device).Kmeans(
            points.shape[1],
            len(centroids),
            niter=1,  # one iteration per call, for the progress bar
            spherical=True,
            # Otherwise faiss warns of fewer than 39 points in each iteration.
            min_points_per_centroid=1,
            max_points_per_centroid=len(points),
        )
        kmeans.index = self._index(points.shape[1])
        kmeans.train(points, init_centroids=centroids)
        # faiss sums cosines; |x - c|^2 = 2 - 2 cos.
        return kmeans.centroids, 2 * (len(points) - kmeans.obj[0])

    def _search(self, points, centroids):
        index = self._index(centroids.shape[1])
        index.add(centroids)
        return index.search(points, 1)[1][:, 0]

    def _index(self, dimensions):
        """Returns an empty index of inner products on the device."""
        faiss, device = require_faiss(self.device), torch.device(self.device)
        index = faiss.IndexFlatIP(dimensions)
        if device.type == "cpu":
            return index
        return faiss.index_cpu_to_gpu(self._gpu, device.index or 0, index)


class TorchKMeans(KMeans):
    """Spherical k-means by torch, with the arguments of `KMeans`.

    It serves GPUs without faiss: faiss-gpu 1.15 is built for CUDA 12 and x86-64
    only, while torch brings CUDA 13. The points are on the device once, in
    float32: 840 MB for VoxCeleb2. Raises ValueError if torch does not see the
    GPU.

    Example
    -------
    >>> clustering = TorchKMeans(n_clusters=3)(np.repeat(np.eye(3), 50, axis=0))
    >>> np.bincount(clustering.labels).tolist()
    [50, 50, 50]
    """

    def _check_device(self, device):
        _check_gpu(device, "torch", torch.cuda.device_count())

    def _to_device(self, points):
        return torch.from_numpy(points).to(self.device)

    def _iterate(self, points, centroids):
        cosines, labels = _nearest(points, centroids)
        inertia = 2 * (len(points) - cosines.sum(dtype=torch.float64))
        sums = sum_by_label(points, labels, len(centroids))
        lengths = torch.linalg.vector_norm(sums, dim=1, keepdim=True)
        centroids = sums / lengths
        empty = (lengths[:, 0] == 0).nonzero()[:, 0]
        if len(empty):
            gaps = (1 - cosines).clamp_(min=0)
            squares = sum_by_label(gaps, labels, len(centroids))
            centroids[empty] = points[self._split(empty, squares, gaps, labels)]
        return centroids, float(inertia)

    def _split(self, empty, squares, gaps, labels):
        """Returns the row of a point for each of the empty clusters."""
        # The cluster with the largest sum of squares gives one of its points,
        # drawn as by k-means++, and counts half from then on. The final inertia
        # is lower than with a split by size, as in faiss, and than with the
        # points farthest from their centroids.
        generator = torch.Generator().manual_seed(self.seed)
        squares[empty] = -1
        rows = []
        for _ in empty:
            worst = squares.argmax()
            squares[worst] /= 2
            members = (labels == worst).nonzero()[:, 0]
            rows.append(members[draw(gaps[members], 1, generator)])
        return torch.cat(rows)

    def _search(self, points, centroids):
        placed = self._to_device(points), self._to_device(centroids)
        return _nearest(*placed)[1].cpu().numpy()


def require_faiss(device: str | torch.device = "cpu") -> ModuleType:
    """Returns the faiss module if it can work on the device.

    Raises ImportError if faiss or its GPU support is missing, and ValueError
    if faiss does not see that GPU.
    """
    device = torch.device(device)
    package = "faiss-cpu" if device.type == "cpu" else "faiss-gpu"
    command = f"pip install {package}"
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
        _check_gpu(device, "faiss", faiss.get_num_gpus())
    return faiss


def _nearest(points, centroids):
    """Returns the cosine and the number (N,) of the nearest centroids."""
    block = max(1, SCORES[points.device.type] // (4 * len(centroids)))
    block = min(block, len(points))
    cosines = points.new_empty(len(points))
    labels = torch.empty_like(cosines, dtype=torch.int64)
    # One buffer, because allocation per block would cost as much as the
    # products.
    scores = points.new_empty(block, len(centroids))
    for start in range(0, len(points), block):
        rows = slice(start, start + block)
        block_scores = torch.mm(
            points[rows], centroids.T, out=scores[: len(points[rows])]
        )
        torch.max(block_scores, dim=1, out=(cosines[rows], labels[rows]))
    return cosines, labels


def _check_gpu(device, library, n_gpus):
    """Raises ValueError if the library does not see the GPU."""
    if device.type != "cpu" and (device.index or 0) >= n_gpus:
        raise ValueError(
            f"clustering on {device}: {library} sees {n_gpus} GPU(s); choose "
            "another device or cluster with device: cpu"
        )
