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

    Example
    -------
    >>> rng = np.random.default_rng(0)
    >>> sample = rng.normal(size=(500, 3)) @ rng.normal(size=(3, 3)) + 5
    >>> bool(np.allclose(np.cov(whiten(sample, sample).T), np.eye(3), 1e-2))
    True
    """
    mean = reference.mean(axis=0)
    covariance = np.cov((reference - mean).T.astype(np.float64))
    values, axes = np.linalg.eigh(covariance)
    # Without the floor, axes that hardly vary would be amplified to noise.
    scale = 1.0 / np.sqrt(np.maximum(values, 1e-3 * values.max()))
    return ((vectors - mean) @ (axes * scale)).astype(np.float32)
