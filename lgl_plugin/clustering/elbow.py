"""Number of clusters by the elbow of the within-cluster sum of squares.

> lgl elbow results/lgl/1/iter1/embeddings
> lgl elbow results/lgl/1/iter1/embeddings --grid=500,1000,2000

The elbow is the point of the curve farthest below its chord, the line from its
first point to its last, both axes scaled to [0, 1]. It depends on the ends of
the grid and on the axis of K: on a linear axis the upper end draws it up, on a
logarithmic one the lower end draws it down, at worst to a few clusters. The
square root lies between and erred least (`benchmarks/elbow.py`): over 36
generated corpora by a factor of 1.36 with the default grid, against 1.68 on
the linear axis, the usual method, and 1.65 on the logarithmic one, whose worst
was 50 times too few; with a grid from K/8 to 8K by 1.15, 1.23 and 1.29.

So bound the grid by what is known of a corpus. Sessions bend the curve as much
as speakers do, and embeddings of an early encoder hardly bend it at all: then
the grid decides, and the number is good to a factor of 2 only. On such curves
the index of Calinski and Harabasz falls to few clusters, and the silhouette
rises to the grid's upper end.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lgl_plugin.clustering.kmeans import Clustering, KMeans

# Maps of K onto its axis, before that is scaled to [0, 1].
SCALES: dict[str, Any] = {"root": np.sqrt, "linear": np.asarray, "log": np.log}


@dataclasses.dataclass(frozen=True, eq=False)
class Estimate:
    """A number of clusters, and the curve behind it.

    Arguments
    ---------
    n_clusters : int
        The elbow.
    grid, inertia : numpy.ndarray
        Numbers of clusters that were tried, ascending, int64 (G,), and the
        within-cluster sum of squares at each, float64 (G,).
    scale : str
        Scale of the axis of the number of clusters: root, linear or log.

    Example
    -------
    >>> grid, inertia = np.array([1, 2, 3]), np.array([9.0, 2.0, 1.0])
    >>> Estimate(elbow(grid, inertia), grid, inertia, "root").n_clusters
    2
    """

    n_clusters: int
    grid: np.ndarray
    inertia: np.ndarray
    scale: str


def below_chord(
    grid: npt.ArrayLike, inertia: npt.ArrayLike, scale: str = "root"
) -> np.ndarray:
    """Returns how far each point (G,) lies below the chord, float64.

    The unit is the whole fall of the sum of squares. Raises ValueError if the
    grid has fewer than three points or does not ascend, or the sum does not
    fall.
    """
    grid = np.asarray(grid, np.float64)
    inertia = np.asarray(inertia, np.float64)
    _check_grid(grid, scale)
    if grid.shape != inertia.shape:
        raise ValueError(
            "an elbow needs a sum of squares at each number of clusters, got "
            f"shapes {inertia.shape} and {grid.shape}"
        )
    # k-means can end at a higher sum with more clusters, where the optimum
    # cannot: such a point counts as low as the lowest before it.
    fall = np.minimum.accumulate(inertia)
    if not (np.isfinite(inertia).all() and fall[-1] < fall[0]):
        raise ValueError(
            "the sum of squares does not fall from the fewest to the most "
            f"clusters: {inertia.tolist()}"
        )
    along = SCALES[scale](grid)
    along = (along - along[0]) / (along[-1] - along[0])
    height = (fall - fall[-1]) / (fall[0] - fall[-1])
    # Along the axis of the sum: the distance from the chord but for a factor.
    return 1 - along - height


def elbow(
    grid: npt.ArrayLike, inertia: npt.ArrayLike, scale: str = "root"
) -> int:
    """Returns the number of clusters at the elbow, the lowest of equals.

    Raises ValueError as `below_chord` does, or if no point is below the chord.
    """
    distances = below_chord(grid, inertia, scale)
    # Rounded: points on a line parallel to the chord must be equals.
    best = int(np.argmax(distances.round(9)))
    if best == 0:
        raise ValueError(
            "the curve of the sum of squares is nowhere below its chord and "
            "has no elbow: choose a wider grid, or set the number of clusters"
        )
    return int(np.asarray(grid)[best])


def default_grid(n_embeddings: int) -> np.ndarray:
    """Returns 24 numbers of clusters, int64, from 2 to half the utterances.

    The largest take nearly all of the time, so a large corpus needs a grid of
    its own. Raises ValueError if there are fewer than 8 utterances.
    """
    if n_embeddings < 8:
        raise ValueError(
            f"{n_embeddings} utterances are too few to estimate a number of "
            "clusters from: 8 are needed"
        )
    return np.unique(np.geomspace(2, n_embeddings // 2, 24).round().astype(int))


def estimate_k(
    kmeans: KMeans,
    embeddings: np.ndarray,
    grid: Sequence[int] | None = None,
    scale: str = "root",
) -> Estimate:
    """Returns an `Estimate` of the number of clusters, without labels.

    Arguments
    ---------
    kmeans : KMeans
        The k-means to run; its own `n_clusters` is not used.
    embeddings : numpy.ndarray
        Embeddings (N, D), of any length but 0.
    grid : sequence of int, optional
        Numbers of clusters to try, at least three; by default 24 from 2 to
        N / 2.
    scale : str
        Scale of the axis of the number of clusters: root, linear or log.

    Raises
    ------
    ValueError
        If the grid has fewer than three numbers, or one below 1 or above N,
        the curve has no elbow, or an embedding is NaN, infinite or zero.

    Example
    -------
    >>> from lgl_plugin.clustering.kmeans import TorchKMeans
    >>> rng = np.random.default_rng(0)
    >>> embeddings = np.repeat(np.eye(6), 50, axis=0)
    >>> embeddings += rng.normal(scale=0.05, size=embeddings.shape)
    >>> kmeans = TorchKMeans(n_clusters=1, n_redo=5)
    >>> estimate_k(kmeans, embeddings, [2, 4, 6, 9, 14, 20]).n_clusters
    6
    """
    if grid is None:
        tried = default_grid(len(embeddings))
    else:
        tried = np.unique(np.asarray(grid, np.int64))
    _check_grid(tried, scale)
    inertia = kmeans.inertia_curve(embeddings, tried.tolist())
    return Estimate(elbow(tried, inertia, scale), tried, inertia, scale)


@dataclasses.dataclass(eq=False)
class ElbowKMeans:
    """k-means with an estimated number of clusters.

    For the yaml's `cluster` where the number of speakers is not known:

        cluster: !new:lgl_plugin.clustering.elbow.ElbowKMeans
            kmeans: !new:lgl_plugin.clustering.kmeans.FaissKMeans
                n_clusters: 1  # not used
                seed: !ref <seed>
            grid: [500, 1000, 2000, 4000, 8000, 16000]

    After a call the attribute `estimate` holds its `Estimate`.

    Arguments and errors are those of `estimate_k`; a bad grid or scale is an
    error already here.

    Example
    -------
    >>> from lgl_plugin.clustering.kmeans import TorchKMeans
    >>> rng = np.random.default_rng(0)
    >>> embeddings = np.repeat(np.eye(6), 50, axis=0)
    >>> embeddings += rng.normal(scale=0.05, size=embeddings.shape)
    >>> cluster = ElbowKMeans(TorchKMeans(1, n_redo=5))
    >>> np.bincount(cluster(embeddings).labels).tolist()
    [50, 50, 50, 50, 50, 50]
    """

    kmeans: KMeans
    grid: Sequence[int] | None = None
    scale: str = "root"
    estimate: Estimate | None = dataclasses.field(
        default=None, init=False, repr=False
    )

    def __post_init__(self) -> None:
        grid = None if self.grid is None else np.unique(self.grid)
        _check_grid(grid, self.scale)

    def check(self, n_embeddings: int) -> None:
        """Raises ValueError if there are too few embeddings for the grid."""
        grid = default_grid(n_embeddings) if self.grid is None else self.grid
        if max(grid) > n_embeddings:
            raise ValueError(
                f"the grid's {max(grid)} clusters are more than the "
                f"{n_embeddings} utterances to cluster; lower its upper end"
            )

    def __call__(self, embeddings: np.ndarray) -> Clustering:
        """Estimates the number of clusters of embeddings, then clusters."""
        self.check(len(embeddings))
        self.estimate = estimate_k(
            self.kmeans, embeddings, self.grid, self.scale
        )
        kmeans = copy.copy(self.kmeans)
        kmeans.n_clusters = self.estimate.n_clusters
        return kmeans(embeddings)


def _check_grid(grid: np.ndarray | None, scale: str) -> None:
    """Raises ValueError if a scale or a grid cannot give an elbow."""
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {list(SCALES)}, got {scale}")
    if grid is None:
        return
    if len(grid) < 3:
        raise ValueError(
            "an elbow needs at least three numbers of clusters, got "
            f"{list(map(int, grid))}"
        )
    if min(grid) < 1 or min(np.diff(grid)) <= 0:
        raise ValueError(
            "the numbers of clusters must ascend from at least 1, got "
            f"{list(map(int, grid))}"
        )
