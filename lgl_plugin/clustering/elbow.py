"""How many clusters: the elbow of the within-cluster sum of squares.

> lgl elbow results/lgl/1/iter1/embeddings
> lgl elbow results/lgl/1/iter1/embeddings --grid=500,1000,2000

The elbow is the point of the curve farthest below its chord, the line from its
first point to its last, both axes scaled to [0, 1]. Where it lies hangs on the
grid's ends and on the axis of K: on a linear one the upper end draws it up, on
a logarithmic one the lower end draws it down, at worst to a few clusters. The
square root lies between and erred least (`benchmarks/elbow.py`): over 36
generated corpora by a factor of 1.36 with the default grid, against 1.68 on
the linear axis and 1.65 on the logarithmic one, whose worst was 50 times too
few; with a grid from K/8 to 8K by 1.15, 1.23 and 1.29. "linear" is the method
as it is usually told.

So bound the grid by what is known of a corpus. Sessions bend the curve as much
as speakers do, and embeddings of an early encoder hardly bend it at all: then
the grid decides, and the number is not to be trusted beyond a factor of 2. The
index of Calinski and Harabasz hangs less on the grid, but falls to few
clusters on such curves; the silhouette rises to the grid's upper end.
"""

import copy
import dataclasses

import numpy as np

# What K is mapped through before the axis is scaled to [0, 1].
SCALES = {"root": np.sqrt, "linear": np.asarray, "log": np.log}


@dataclasses.dataclass(frozen=True, eq=False)
class Estimate:
    """A number of clusters, and the curve that it was read from.

    Arguments
    ---------
    n_clusters : int
        The elbow.
    grid : numpy.ndarray
        Numbers of clusters that were tried, ascending, int64 (G,).
    inertia : numpy.ndarray
        Within-cluster sum of squares at each, float64 (G,).
    scale : str
        Of the axis of the number of clusters.

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


def below_chord(grid, inertia, scale="root"):
    """How far each point of a curve lies below its chord.

    Measured along the axis of the sum of squares, which is the distance from
    the chord but for a factor. k-means can end at a higher sum with more
    clusters, where the optimum cannot: such a point counts as low as the
    lowest before it.

    Arguments
    ---------
    grid : array-like
        Numbers of clusters (G,), ascending, at least three.
    inertia : array-like
        Sum of squares at each (G,).
    scale : str
        Of the axis of the number of clusters: root, linear or log.

    Returns
    -------
    numpy.ndarray
        Distances (G,), float64, in shares of the whole fall; 0 at both ends,
        negative above the chord.

    Raises
    ------
    ValueError
        If there are fewer than three points, the grid does not ascend, the
        sum does not fall or is not finite, or there is no such scale.

    Example
    -------
    >>> below_chord([1, 3, 5], [10.0, 4.0, 2.0], scale="linear")
    array([0.  , 0.25, 0.  ])
    """
    _check(scale, grid)
    grid = np.asarray(grid, np.float64)
    inertia = np.asarray(inertia, np.float64)
    if grid.shape != inertia.shape:
        raise ValueError(
            "an elbow needs a sum of squares at each number of clusters, got "
            f"shapes {inertia.shape} and {grid.shape}"
        )
    fall = np.minimum.accumulate(inertia)
    if not (np.isfinite(inertia).all() and fall[-1] < fall[0]):
        raise ValueError(
            "the sum of squares does not fall from the fewest to the most "
            f"clusters: {inertia.tolist()}"
        )
    along = SCALES[scale](grid)
    along = (along - along[0]) / (along[-1] - along[0])
    height = (fall - fall[-1]) / (fall[0] - fall[-1])
    return 1 - along - height


def elbow(grid, inertia, scale="root"):
    """The number of clusters at the elbow of a curve.

    Arguments
    ---------
    grid : array-like
        Numbers of clusters (G,), ascending, at least three.
    inertia : array-like
        Sum of squares at each (G,).
    scale : str
        Of the axis of the number of clusters: root, linear or log.

    Returns
    -------
    int
        One of the grid, never its first or last; the lowest of several that
        are equally far below the chord.

    Raises
    ------
    ValueError
        From `below_chord`, or if no point is below the chord.

    Example
    -------
    >>> elbow([1, 2, 3, 4, 5], [100.0, 50.0, 10.0, 8.0, 6.0])
    3
    """
    distances = below_chord(grid, inertia, scale)
    best = int(np.argmax(distances.round(9)))  # ties but for rounding
    if best == 0:
        raise ValueError(
            "the curve of the sum of squares is nowhere below its chord and "
            "has no elbow: choose a wider grid, or set the number of clusters"
        )
    return int(grid[best])


def default_grid(n_embeddings):
    """Numbers of clusters to try where nothing is known of the corpus.

    24 steps of one ratio, from 2 clusters to half the utterances. The largest
    take nearly all of the time: a large corpus wants a grid of its own, which
    surely contains the number of speakers.

    Arguments
    ---------
    n_embeddings : int
        Utterances, at least 8.

    Returns
    -------
    numpy.ndarray
        Ascending, int64.

    Raises
    ------
    ValueError
        If there are fewer utterances.

    Example
    -------
    >>> default_grid(8)
    array([2, 3, 4])
    >>> default_grid(1000)[[0, 1, -2, -1]]
    array([  2,   3, 393, 500])
    """
    if n_embeddings < 8:
        raise ValueError(
            f"{n_embeddings} utterances are too few to estimate a number of "
            "clusters from: 8 are needed"
        )
    return np.unique(np.geomspace(2, n_embeddings // 2, 24).round().astype(int))


def estimate_k(kmeans, embeddings, grid=None, scale="root"):
    """Estimates the number of clusters; no labels are involved.

    Arguments
    ---------
    kmeans : lgl_plugin.clustering.kmeans.KMeans
        What clusters; its own `n_clusters` is not looked at.
    embeddings : numpy.ndarray
        Embeddings (N, D), of any length but 0.
    grid : sequence of int, optional
        Numbers of clusters to try, at least three; `default_grid` if None.
    scale : str
        Of the axis of the number of clusters: root, linear or log.

    Returns
    -------
    Estimate

    Raises
    ------
    ValueError
        From `elbow`, `default_grid` and `KMeans.inertia_curve`.

    Example
    -------
    >>> rng = np.random.default_rng(0)
    >>> embeddings = np.repeat(np.eye(6), 50, axis=0)
    >>> embeddings += rng.normal(scale=0.05, size=embeddings.shape)
    >>> kmeans = TorchKMeans(n_clusters=1, n_redo=5)
    >>> estimate_k(kmeans, embeddings, [2, 4, 6, 9, 14, 20]).n_clusters
    6
    """
    if grid is None:
        grid = default_grid(len(embeddings))
    grid = np.unique(np.asarray(grid, np.int64))
    _check(scale, grid)
    inertia = kmeans.inertia_curve(embeddings, grid.tolist())
    return Estimate(elbow(grid, inertia, scale), grid, inertia, scale)


class ElbowKMeans:
    """k-means with a number of clusters that it finds itself.

    For the yaml's `cluster` where the number of speakers is not known:

        cluster: !new:lgl_plugin.clustering.elbow.ElbowKMeans
            kmeans: !new:lgl_plugin.clustering.kmeans.FaissKMeans
                n_clusters: 1  # not looked at
                seed: !ref <seed>
            grid: [500, 1000, 2000, 4000, 8000, 16000]

    Arguments
    ---------
    kmeans : KMeans
        What clusters.
    grid : sequence of int, optional
        Numbers of clusters to try, at least three; `default_grid` if None.
    scale : str
        Of the axis of the number of clusters: root, linear or log.

    Attributes
    ----------
    estimate : Estimate
        Of the last call.

    Raises
    ------
    ValueError
        If the grid has fewer than three numbers or one below 1, or there is
        no such scale.

    Example
    -------
    >>> rng = np.random.default_rng(0)
    >>> embeddings = np.repeat(np.eye(6), 50, axis=0)
    >>> embeddings += rng.normal(scale=0.05, size=embeddings.shape)
    >>> cluster = ElbowKMeans(TorchKMeans(n_clusters=1, n_redo=5))
    >>> np.bincount(cluster(embeddings).labels).tolist()
    [50, 50, 50, 50, 50, 50]
    """

    def __init__(self, kmeans, grid=None, scale="root"):
        _check(scale, None if grid is None else np.unique(grid))
        self.kmeans = kmeans
        self.grid = grid
        self.scale = scale
        self.estimate = None

    def check(self, n_embeddings):
        """Whether so many embeddings can be clustered; callable long before.

        Arguments
        ---------
        n_embeddings : int
            Number of utterances.

        Raises
        ------
        ValueError
            If a number of the grid is larger, or there are too few.
        """
        grid = default_grid(n_embeddings) if self.grid is None else self.grid
        if max(grid) > n_embeddings:
            raise ValueError(
                f"the grid's {max(grid)} clusters are more than the "
                f"{n_embeddings} utterances to cluster; lower its upper end"
            )

    def __call__(self, embeddings):
        """Estimates the number of clusters, then clusters.

        Arguments
        ---------
        embeddings : numpy.ndarray
            Embeddings (N, D), of any length but 0, or a memory map.

        Returns
        -------
        Clustering

        Raises
        ------
        ValueError
            From `estimate_k`.
        """
        self.check(len(embeddings))
        self.estimate = estimate_k(
            self.kmeans, embeddings, self.grid, self.scale
        )
        kmeans = copy.copy(self.kmeans)
        kmeans.n_clusters = self.estimate.n_clusters
        return kmeans(embeddings)


def _check(scale, grid=None):
    """Refuses a scale or a grid that no elbow can be read from."""
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
