"""Back-ends: transforms of embeddings before cosine scoring, without labels.

All back-ends have one interface. A yaml makes one by `!new:`, `fit` takes
unlabelled embeddings (N, D), and a call transforms others. Like the cosine, a
back-end ignores the length of an embedding: `fit` and a call first scale each
to length 1. Then a mean is subtracted, and the difference multiplied by a
projection. So two arrays describe a back-end, and modules of SpeechBrain can
do the same.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

from lgl_plugin.utils.files import load_arrays, save_arrays

BLOCK = 16384  # rows at once: tens of megabytes, however many there are
# The share of the largest variance up to which a variance counts as 0: rounding
# leaves 1e-16.
NO_VARIANCE = 1e-12


class Backend:
    """A back-end with a given mean and projection; base class of the others.

    Arguments
    ---------
    mean, projection : array-like, (D,) and (D, D'), float
        The mean is subtracted from embeddings of length 1, and the difference
        is multiplied by the projection.

    Example
    -------
    >>> backend = Backend(mean=[0, 0], projection=[[0, 1], [2, 0]])
    >>> backend([[3, 4]]).round(3)
    array([[1.6, 0.6]], dtype=float32)
    """

    def __init__(
        self,
        mean: ArrayLike | None = None,
        projection: ArrayLike | None = None,
    ):
        self.mean, self.projection = (
            None if array is None else np.asarray(array, np.float64)
            for array in (mean, projection)
        )

    def fit(self, embeddings: ArrayLike) -> Backend:
        """Does nothing: mean and projection are given."""
        return self

    def fit_transform(self, embeddings: ArrayLike) -> np.ndarray:
        """Fits the back-end on embeddings, and transforms them.

        Arguments
        ---------
        embeddings : array-like, (N, D), float
            Such as a store's, on disk.

        Returns
        -------
        numpy.ndarray
            The result of a call, float32 (N, D').

        Raises
        ------
        ValueError
            As `fit` and a call do.

        Example
        -------
        >>> Centring().fit_transform([[1, 0], [0, 2]]).tolist()
        [[0.5, -0.5], [-0.5, 0.5]]
        """
        return self.fit(embeddings)(embeddings)

    def __call__(self, embeddings: ArrayLike) -> np.ndarray:
        """Transforms embeddings (n, D), such as a store's, to (n, D').

        Computes in float64 and returns float32. Raises ValueError if an
        embedding is not finite, or the back-end is not fitted.
        """
        if self.mean is None or self.projection is None:
            raise ValueError(f"{type(self).__name__} is not fitted yet")
        vectors = np.asarray(embeddings)  # does not copy a memory map
        shape = (len(vectors), self.projection.shape[1])
        transformed = np.empty(shape, np.float32)
        for rows, unit in unit_blocks(vectors):
            transformed[rows] = (unit - self.mean) @ self.projection
        return transformed

    def save(self, path: str | pathlib.Path) -> None:
        """Writes the arrays `mean` and `projection` as an npz file."""
        save_arrays(path, mean=self.mean, projection=self.projection)


def load_backend(path: str | pathlib.Path) -> Backend:
    """Reads a back-end of any class that `Backend.save` wrote.

    Arguments
    ---------
    path : str or pathlib.Path
        Such as a run's `stage1/backend.npz`.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file, or it is damaged.

    Example
    -------
    >>> path = getfixture("tmp_path") / "backend.npz"
    >>> Centring().fit([[2, 0], [0, 3]]).save(path)
    >>> load_backend(path)([[5, 0]]).tolist()
    [[0.5, -0.5]]
    """
    arrays = load_arrays(path)
    try:
        mean, projection = arrays["mean"], arrays["projection"]
        if projection.ndim != 2 or mean.shape != projection.shape[:1]:
            raise ValueError(
                "mean (D,) and projection (D, D') do not fit, got shapes "
                f"{mean.shape} and {projection.shape}"
            )
        return Backend(mean, projection)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} holds no back-end: {error}") from error


class Identity(Backend):
    """Only scales embeddings to length 1.

    Example
    -------
    >>> Identity().fit([[1, 2], [2, 1]])([[0, 3]]).tolist()
    [[0.0, 1.0]]
    """

    def fit(self, embeddings: ArrayLike) -> Backend:
        """Takes the number of dimensions from embeddings (N, D)."""
        size = np.asarray(embeddings).shape[1]
        self.mean, self.projection = np.zeros(size), np.eye(size)
        return self


class Centring(Backend):
    """Subtracts the mean embedding.

    Example
    -------
    >>> Centring().fit([[1, 0], [0, 2]])([[0, 3]]).tolist()
    [[-0.5, 0.5]]
    """

    def fit(self, embeddings: ArrayLike) -> Backend:
        """Takes the mean from embeddings (N, D), N from 1."""
        self.mean = mean_of(embeddings)
        self.projection = np.eye(len(self.mean))
        return self


class Whitening(Backend):
    """Subtracts the mean and evens out the variance of all directions.

    With the mean m and the covariance V diag(w) V' of the embeddings that are
    fitted, y = (x - m) V / sqrt(w + shrinkage * mean(w)).

    Arguments
    ---------
    shrinkage : float
        The share, from 0, of the mean variance that is added to the variance
        of each direction. 0 gives unit covariance, and amplifies the noise of
        directions that hardly vary. A large value only centres. With 1 or more,
        fewer embeddings than dimensions suffice, but at least 2. Scores are
        better with 10 than with 1, clusters with 1 than with 10
        (docs/choices_measured.md, "Shrinkage").

    Example
    -------
    >>> rng = np.random.default_rng(0)
    >>> sample = rng.normal(size=(500, 3)) @ rng.normal(size=(3, 3)) + 1
    >>> white = Whitening(shrinkage=0.0).fit_transform(sample)
    >>> bool(np.allclose(np.cov(white.T), np.eye(3), atol=1e-5))
    True
    """

    def __init__(self, shrinkage: float = 10.0):
        if not 0 <= shrinkage < np.inf:
            raise ValueError(f"shrinkage must be from 0, got {shrinkage}")
        super().__init__()
        self.shrinkage = shrinkage

    def fit(self, embeddings: ArrayLike) -> Backend:
        """Takes mean and covariance from embeddings (N, D), in blocks.

        Raises ValueError if there are fewer than two embeddings, all are equal,
        or one is not finite.
        """
        vectors = np.asarray(embeddings)
        n_rows, mean = len(vectors), mean_of(vectors)
        scatter = np.zeros((len(mean), len(mean)))
        for _, unit in unit_blocks(vectors):
            unit -= mean
            scatter += unit.T @ unit
        # The trace of equal rows is a rounding error, far below this limit.
        if n_rows < 2 or not np.trace(scatter) > NO_VARIANCE * n_rows:
            raise ValueError(
                "whitening needs embeddings that differ, got "
                f"{n_rows}: a collapsed encoder's do not"
            )
        values, axes = np.linalg.eigh(scatter / (n_rows - 1))
        values = np.maximum(values, 0)  # rounding may leave -1e-18
        shrunk = values + self.shrinkage * values.mean()
        # Without shrinkage, directions without variance are set to 0: dividing
        # by their variance would amplify rounding errors.
        varies = shrunk > NO_VARIANCE * values.max()
        shrunk[~varies] = np.inf
        self.mean, self.projection = mean, axes / np.sqrt(shrunk)
        return self


def mean_of(embeddings: ArrayLike) -> np.ndarray:
    """Returns the mean (D,) of embeddings (N, D) at length 1, float64."""
    vectors = np.asarray(embeddings)
    if vectors.ndim != 2 or not len(vectors):
        raise ValueError(
            "a back-end is fitted on embeddings (N, D), got shape "
            f"{vectors.shape}"
        )
    total = np.zeros(vectors.shape[1])
    for _, unit in unit_blocks(vectors):
        total += unit.sum(axis=0)
    return total / len(vectors)


def unit_blocks(vectors: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields slices, and their rows at length 1, float64; zeros stay zeros."""
    for start in range(0, len(vectors), BLOCK):
        where = slice(start, start + BLOCK)
        block = np.asarray(vectors[where], np.float64)
        norms = np.linalg.norm(block, axis=1, keepdims=True)
        if not np.isfinite(norms).all():
            raise ValueError(
                "an embedding is not finite: look for a diverged encoder or a "
                "damaged file"
            )
        yield where, block / np.maximum(norms, np.finfo(np.float64).tiny)
