"""Back-ends: transforms of embeddings before they are compared."""

import numpy as np
from numpy.typing import ArrayLike


def whiten(reference: ArrayLike, vectors: ArrayLike) -> np.ndarray:
    """Transforms vectors to zero mean and unit covariance of a reference set.

    Arguments
    ---------
    reference, vectors : array-like, (n, D) and (m, D), float
        Embeddings that give mean and covariance, without labels, and those to
        transform.

    Returns
    -------
    numpy.ndarray, (m, D), float32

    Raises
    ------
    ValueError
        If the reference has fewer than two vectors, or these are equal.

    Example
    -------
    >>> rng = np.random.default_rng(0)
    >>> sample = rng.normal(size=(500, 3)) @ rng.normal(size=(3, 3)) + 5
    >>> bool(np.allclose(np.cov(whiten(sample, sample).T), np.eye(3), 1e-2))
    True
    """
    reference, vectors = np.asarray(reference), np.asarray(vectors)
    # A mean in the float16 of a compact store would be off by 0.1 %.
    precise = np.promote_types(reference.dtype, np.float32)
    mean = reference.mean(axis=0, dtype=precise)
    centred = (reference - mean).astype(np.float64)
    if len(reference) < 2 or not centred.any():
        raise ValueError(
            "whitening needs a reference of vectors that differ, got "
            f"{len(reference)}"
        )
    covariance = np.atleast_2d(np.cov(centred.T))
    values, axes = np.linalg.eigh(covariance)
    # Without the floor, axes that hardly vary would be amplified to noise.
    scale = 1.0 / np.sqrt(np.maximum(values, 1e-3 * values.max()))
    return ((vectors - mean) @ (axes * scale)).astype(np.float32)
