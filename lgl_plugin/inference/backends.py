"""Back-ends: transforms of embeddings before they are compared."""

import numpy as np


def whiten(reference: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Transforms vectors to zero mean and unit covariance of a reference set.

    Arguments
    ---------
    reference : numpy.ndarray, (n, D), float
        Source of mean and covariance; needs no labels.
    vectors : numpy.ndarray, (m, D), float
        Embeddings to transform.

    Returns
    -------
    numpy.ndarray, (m, D), float32
        The transformed embeddings.

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
    mean = reference.mean(axis=0)
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
