"""Back-ends: what is done to embeddings before they are compared."""

import numpy as np
from speechbrain.utils.logger import get_logger

logger = get_logger(__name__)


def whiten(reference, vectors):
    """Turns vectors to zero mean and unit covariance of a reference set.

    Arguments
    ---------
    reference : numpy.ndarray
        Shape (n, dim): where mean and covariance come from, no labels.
    vectors : numpy.ndarray
        Shape (m, dim): what is turned.

    Returns
    -------
    numpy.ndarray
        Shape (m, dim), float32.

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
    # Bands that hardly vary would be blown up to pure noise.
    scale = 1.0 / np.sqrt(np.maximum(values, 1e-3 * values.max()))
    return ((vectors - mean) @ (axes * scale)).astype(np.float32)
