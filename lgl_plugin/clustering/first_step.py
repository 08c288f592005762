"""The first step of agglomerative clustering: from many points to fewer."""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from lgl_plugin.clustering.kmeans import KMeans
from lgl_plugin.clustering.vectors import (
    check_embeddings,
    chunks,
    normalised,
    sum_by_label,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """Small clusters that the second step joins, and their members.

    `labels`, int64 (N,), is the part of each embedding. `means`, float32 (P,
    D), is the mean of each part's embeddings at length 1. `sizes` is each
    part's number of members. `within` is the sum of squared distances of
    members to means.
    """

    labels: np.ndarray
    means: Tensor
    sizes: Tensor
    within: float


def check_kmeans(kmeans: object) -> None:
    """Refuses a first step that is no k-means, such as a `!name:`."""
    if not isinstance(kmeans, KMeans):
        raise ValueError(f"kmeans must be a KMeans made by !new:, got {kmeans}")


def parts(kmeans: KMeans, embeddings: np.ndarray) -> Parts:
    """Splits embeddings (N, D) into the clusters of a k-means.

    If there are no more embeddings than clusters, each embedding is a part.
    Raises ValueError as `kmeans` does.
    """
    embeddings = np.asarray(embeddings)
    if len(embeddings) > kmeans.n_clusters:
        labels = kmeans(embeddings).labels
    else:
        check_embeddings(embeddings)
        labels = np.arange(len(embeddings))
    return parts_of(embeddings, labels, kmeans.device)


def parts_of(embeddings: np.ndarray, labels: np.ndarray, device: str) -> Parts:
    """Describes the clusters of embeddings (N, D) by their labels from 0."""
    means, sizes = means_of(embeddings, labels)
    # Embeddings have length 1, so the squared lengths of a part's members sum
    # to its size.
    within = len(labels) - float((sizes * means.double().square().sum(1)).sum())
    return Parts(labels, means.to(device), sizes, max(within, 0.0))


def means_of(
    embeddings: np.ndarray, labels: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Returns the mean of the normalised embeddings of each label from 0.

    The means are float32 (K, D). The second value is the number of members,
    int64 (K,). Embeddings (N, D) with the label -1 are left out.
    """
    n_labels = int(labels.max()) + 1
    sizes = np.bincount(labels[labels >= 0], minlength=n_labels)
    sums = torch.zeros(n_labels, embeddings.shape[1])
    for rows in chunks(len(embeddings)):
        labelled = labels[rows] >= 0
        points = torch.from_numpy(normalised(embeddings[rows][labelled]))
        members = torch.from_numpy(labels[rows][labelled])
        sums += sum_by_label(points, members, n_labels)
    counts = torch.from_numpy(sizes)
    return sums / counts[:, None], counts
