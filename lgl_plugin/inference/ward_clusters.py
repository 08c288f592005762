"""Clusters of whitened embeddings by Ward's method, which stand for speakers.

Whitening with a shrinkage of 1 gives the best clusters, and the estimate of
their number assumes it (docs/choices_measured.md, "Shrinkage").
"""

from typing import Literal

import numpy as np

from lgl_plugin.clustering.kmeans import TorchKMeans
from lgl_plugin.clustering.number import FIRST_STEP, Estimate, estimate
from lgl_plugin.clustering.two_step import TwoStepKMeans
from lgl_plugin.inference.backends import Whitening

SHRINKAGE = 1.0


def ward_labels(
    embeddings: np.ndarray,
    n_clusters: int | Literal["auto"] = "auto",
    seed: int = 0,
    device: str = "cpu",
) -> np.ndarray:
    """Clusters embeddings (N, D); returns labels, int64 (N,)."""
    kmeans = TorchKMeans(FIRST_STEP, seed=seed, device=device)
    points = Whitening(SHRINKAGE).fit_transform(embeddings)
    return TwoStepKMeans(kmeans, n_clusters)(points).labels


def ward_estimate(
    embeddings: np.ndarray, seed: int = 0, device: str = "cpu"
) -> Estimate:
    """Estimates the number of clusters of embeddings (N, D), N from 8."""
    kmeans = TorchKMeans(FIRST_STEP, seed=seed, device=device)
    return estimate(kmeans, Whitening(SHRINKAGE).fit_transform(embeddings))
