"""Pseudo-labels from embeddings: spherical k-means by faiss or by torch.

Arrays in, arrays out: who the embeddings belong to and where the labels are
kept is for others to know.
"""

import abc
import contextlib
import dataclasses
import importlib

import numpy as np
import torch
from tqdm import tqdm

from lgl_plugin.clustering.seeding import draw, kmeans_plus_plus

# Rows that are normalised and assigned at once: 50 MB at 192 dimensions.
CHUNK = 65536
# Cosines that `TorchKMeans` holds at once, in bytes: a share of the last-level
# cache of a CPU, and on a GPU enough to keep it busy.
SCORES = {"cpu": 8 * 2**20, "cuda": 2**30}


@dataclasses.dataclass(frozen=True)
class Clustering:
    """What was found.

    Arguments
    ---------
    labels : numpy.ndarray
        Cluster of each embedding (N,), int64, in [0, n_clusters).
    centroids : numpy.ndarray
        Centroids (n_clusters, D), float32, of length 1. Each embedding has
        the label of the centroid with the highest cosine; see
        `TwoStepKMeans` for the exception.
    inertia : numpy.ndarray
        Sum of squared distances of the points used to their centroids, at
        the start of each iteration: (n_iterations,), float64.
    n_clusters : int
        Clusters that have a member.
    n_empty : int
        Clusters asked for that ended without a member and were dropped.
    points_used : int
        Embeddings that the centroids were trained on; all N were assigned.

    Example
    -------
    >>> points = np.float32([[1, 0], [5, 1], [0, 1], [1, 5]])
    >>> found = TorchKMeans(n_clusters=2)(points)
    >>> a, b, c, d = found.labels.tolist()
    >>> a == b != c == d, found.centroids.shape, found.points_used
    (True, (2, 2), 4)
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


class KMeans(abc.ABC):
    """Spherical k-means: cosine is the metric in training and assignment.

    The embeddings are L2-normalised, and so is each centroid after each
    iteration. (The released code searches by inner product among centroids
    that are not, which favours long ones: the compact clusters.) Same
    seed, same labels, on one machine.

    What `FaissKMeans` and `TorchKMeans` have in common; one of them is what
    to use.

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
    ValueError
        If a number is below 1.

    Example
    -------
    >>> TorchKMeans(n_clusters=6000).check(n_embeddings=100)
    Traceback (most recent call last):
    ValueError: n_clusters=6000 is more than the 100 utterances to cluster...
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
        _check_number(self.n_clusters, n_embeddings)

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
        with self._running():
            points = self._training_points(embeddings, self.n_clusters)
            ((centroids, inertia),) = self._train(points, [self.n_clusters])
            labels = self._assign(embeddings, centroids)
        present, labels = np.unique(labels, return_inverse=True)
        return Clustering(
            labels=labels.astype(np.int64),
            centroids=centroids[present],
            inertia=inertia,
            n_clusters=len(present),
            n_empty=self.n_clusters - len(present),
            points_used=len(points),
        )

    def inertia_curve(self, embeddings, grid):
        """Inertia over the number of clusters, for its elbow.

        The points are normalised once and the first centroids drawn once,
        for the largest K: the smaller ones start from the first of them.

        Arguments
        ---------
        embeddings : numpy.ndarray
            Embeddings (N, D), of any length but 0.
        grid : sequence of int
            Numbers of clusters; `n_clusters` is not looked at. All are
            trained on the sample for the largest.

        Returns
        -------
        numpy.ndarray
            Inertia at the start of the last iteration, one for each of the
            grid, float64.

        Raises
        ------
        ValueError
            If a K is below 1 or larger than N, or an embedding is NaN,
            infinite or zero.

        Example
        -------
        >>> embeddings = np.repeat(np.eye(3), 50, axis=0)
        >>> TorchKMeans(3).inertia_curve(embeddings, [1, 2, 3]).round(3)
        array([126.795,  58.579,   0.   ])
        """
        if min(grid) < 1:
            raise ValueError(f"a K of the grid is below 1: {list(grid)}")
        with self._running():
            points = self._training_points(embeddings, max(grid))
            runs = self._train(points, grid)
        return np.array([inertia[-1] for _, inertia in runs])

    def _training_points(self, embeddings, n_clusters):
        """What to train on, checked, sampled and normalised."""
        if embeddings.ndim != 2:
            raise ValueError(
                "embeddings must be (utterances, dimensions), got shape "
                f"{embeddings.shape}"
            )
        n = len(embeddings)
        _check_number(n_clusters, n)
        _check_directions(embeddings)
        size = n_clusters * self.max_points_per_centroid
        if size < n:
            rng = np.random.default_rng(self.seed)
            rows = np.sort(rng.choice(n, size, replace=False))
            embeddings = embeddings[rows]
        return normalised(embeddings)

    def _train(self, points, grid):
        """Centroids and inertia curve of the best run, for each K."""
        best = [None] * len(grid)
        placed = self._place(points)
        with tqdm(
            total=len(grid) * self.n_redo * self.n_iterations, unit="iteration"
        ) as progress:
            for seed in range(self.seed, self.seed + self.n_redo):
                first = self._first_centroids(points, max(grid), seed)
                for place, n_clusters in enumerate(grid):
                    progress.set_description(f"k-means, K={n_clusters}")
                    centroids = self._place(first[:n_clusters])
                    inertia = np.zeros(self.n_iterations)
                    for iteration in range(self.n_iterations):
                        if n_clusters < len(points):
                            centroids, inertia[iteration] = self._iterate(
                                placed, centroids
                            )
                        progress.update()
                    if best[place] is None or inertia[-1] < best[place][1][-1]:
                        best[place] = centroids, inertia
        return [
            (torch.as_tensor(centroids).cpu().numpy(), inertia)
            for centroids, inertia in best
        ]

    def _first_centroids(self, points, n_clusters, seed):
        """Greedy k-means++ on at most ten points per centroid.

        faiss starts from random points, which leaves speakers that are well
        apart without a centroid of their own, and others with two. Few
        points do: all of them would take longer than the iterations.
        """
        rng = np.random.default_rng(seed)
        size = min(len(points), 10 * n_clusters)
        rows = rng.choice(len(points), size, replace=False)
        sample = torch.from_numpy(points[rows]).to(self.device)
        seeds = kmeans_plus_plus(sample, n_clusters, seed)
        return points[rows[seeds.numpy()]]

    def _assign(self, embeddings, centroids):
        search = self._searcher(centroids)
        labels = np.empty(len(embeddings), dtype=np.int64)
        with tqdm(
            total=len(embeddings),
            desc="assigning",
            unit="utterance",
            unit_scale=True,
        ) as progress:
            for start in range(0, len(embeddings), CHUNK):
                chunk = normalised(embeddings[start : start + CHUNK])
                labels[start : start + CHUNK] = search(chunk)
                progress.update(len(chunk))
        return labels

    def _running(self):
        """A context for all that is computed."""
        return exact_matmul()

    @abc.abstractmethod
    def _place(self, points):
        """The array in the form and place that `_iterate` works on."""

    @abc.abstractmethod
    def _iterate(self, points, centroids):
        """One of Lloyd's iterations: new centroids, inertia of the old."""

    @abc.abstractmethod
    def _searcher(self, centroids):
        """A function from points to their nearest centroids, as arrays."""


class FaissKMeans(KMeans):
    """Spherical k-means by faiss.

    Arguments
    ---------
    *args, **kwargs
        Those of `KMeans`.

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

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.faiss = require_faiss(self.device)

    @contextlib.contextmanager
    def _running(self):
        with super()._running():
            if self.device.type != "cpu":
                # 1.5 GB of the GPU, which training will want back.
                self.resources = self.faiss.StandardGpuResources()
            try:
                yield
            finally:
                self.resources = None

    def _place(self, points):
        return points

    def _iterate(self, points, centroids):
        kmeans = self.faiss.Kmeans(
            points.shape[1],
            len(centroids),
            niter=1,  # at a time, for the progress bar
            spherical=True,
            # The sample is ours, and warnings of less than 39 points
            # per centroid would come once per iteration.
            min_points_per_centroid=1,
            max_points_per_centroid=len(points),
        )
        kmeans.index = self._index(points.shape[1])
        kmeans.train(points, init_centroids=centroids)
        # faiss sums cosines; |x - c|^2 = 2 - 2 cos.
        return kmeans.centroids, 2 * (len(points) - kmeans.obj[0])

    def _searcher(self, centroids):
        index = self._index(centroids.shape[1])
        index.add(centroids)
        return lambda points: index.search(points, 1)[1][:, 0]

    def _index(self, dimensions):
        index = self.faiss.IndexFlatIP(dimensions)
        if self.device.type == "cpu":
            return index
        return self.faiss.index_cpu_to_gpu(
            self.resources, self.device.index or 0, index
        )


class TorchKMeans(KMeans):
    """Spherical k-means by torch, for GPUs where faiss-gpu is not to be had.

    The points lie on the device once, in float32: 840 MB for VoxCeleb2.

    Arguments
    ---------
    *args, **kwargs
        Those of `KMeans`.

    Raises
    ------
    ValueError
        If a number is below 1, or there is no such GPU.

    Example
    -------
    >>> rng = np.random.default_rng(0)
    >>> embeddings = np.repeat(np.eye(3), 50, axis=0)
    >>> embeddings += rng.normal(scale=0.05, size=embeddings.shape)
    >>> clustering = TorchKMeans(n_clusters=3, n_redo=5)(embeddings)
    >>> np.bincount(clustering.labels).tolist()
    [50, 50, 50]
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if (
            self.device.type != "cpu"
            and (self.device.index or 0) >= torch.cuda.device_count()
        ):
            raise ValueError(
                f"clustering on {self.device}: torch sees "
                f"{torch.cuda.device_count()} GPU(s); choose another device "
                "or cluster with device: cpu"
            )

    def _place(self, points):
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
        """Rows of points that empty clusters are put on, one for each.

        The cluster with the largest sum of squares gives one of its points,
        drawn as by k-means++, and counts half from then on. This ended at a
        lower inertia than splitting by size, as faiss does, and than taking
        the points farthest from their centroids.
        """
        generator = torch.Generator().manual_seed(self.seed)
        squares[empty] = -1
        rows = []
        for _ in empty:
            worst = squares.argmax()
            squares[worst] /= 2
            members = (labels == worst).nonzero()[:, 0]
            rows.append(members[draw(gaps[members], 1, generator)])
        return torch.cat(rows)

    def _searcher(self, centroids):
        centroids = self._place(centroids)
        return lambda points: (
            _nearest(self._place(points), centroids)[1].cpu().numpy()
        )


def sum_by_label(values, labels, n_labels):
    """Sums of the rows with the same label; the same from run to run.

    Arguments
    ---------
    values : torch.Tensor
        Rows (N, ...).
    labels : torch.Tensor
        Label of each row (N,), int64, in [0, n_labels).
    n_labels : int
        Number of sums; that of a label without rows is 0.

    Returns
    -------
    torch.Tensor
        Sums (n_labels, ...), of the type of `values`.

    Example
    -------
    >>> sum_by_label(torch.ones(5), torch.tensor([2, 0, 2, 2, 0]), 3)
    tensor([2., 0., 3.])
    """
    sums = values.new_zeros((n_labels, *values.shape[1:]))
    if values.device.type == "cpu":
        return sums.index_add_(0, labels, values)
    # By sorting the labels: index_add_ would add in any order there.
    return sums.index_put_((labels,), values, accumulate=True)


def _nearest(points, centroids):
    """Cosine and number of each point's nearest centroid, block by block."""
    block = max(1, SCORES[points.device.type] // (4 * len(centroids)))
    block = min(block, len(points))
    cosines = points.new_empty(len(points))
    labels = torch.empty_like(cosines, dtype=torch.int64)
    # Memory taken afresh for each block would cost as much as the products.
    scores = points.new_empty(block, len(centroids))
    for start in range(0, len(points), block):
        now = slice(start, start + block)
        some = torch.mm(
            points[now], centroids.T, out=scores[: len(points[now])]
        )
        torch.max(some, dim=1, out=(cosines[now], labels[now]))
    return cosines, labels


def normalised(embeddings):
    """Copies embeddings at length 1.

    Arguments
    ---------
    embeddings : numpy.ndarray
        Embeddings (N, D), none of length 0.

    Returns
    -------
    numpy.ndarray
        Unit vectors (N, D), float32, contiguous.

    Example
    -------
    >>> normalised(np.array([[3, 4]]))
    array([[0.6, 0.8]], dtype=float32)
    """
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


def _check_number(n_clusters, n_embeddings):
    """Refuses more clusters than there are utterances."""
    if n_clusters > n_embeddings:
        raise ValueError(
            f"n_clusters={n_clusters} is more than the {n_embeddings} "
            "utterances to cluster; lower n_clusters"
        )


@contextlib.contextmanager
def exact_matmul():
    """Float32 products without TF32: near ties must not depend on it.

    Example
    -------
    >>> with exact_matmul():
    ...     torch.get_float32_matmul_precision()
    'highest'
    """
    before = torch.get_float32_matmul_precision()
    # From torch 2.9 on. SpeechBrain allows TF32 on GPUs alone; without this,
    # what is restored would reach the CPU, and training would round otherwise
    # after clustering than in a process that did not cluster.
    cpu = getattr(torch.backends.mkldnn, "matmul", None)
    on_cpu = getattr(cpu, "fp32_precision", None)
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        if on_cpu is not None:
            cpu.fp32_precision = on_cpu
