"""Functions on embeddings and labels that all clusterings share."""

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

# Rows that are normalised and assigned at once: 50 MB at 192 dimensions.
CHUNK = 65536
# Centroids that are compared with all others at once: 100 MB at 25,000.
CENTROIDS = 1024


def chunks(n: int) -> Iterator[slice]:
    """Yields slices of at most `CHUNK` rows that cover n rows."""
    for start in range(0, n, CHUNK):
        yield slice(start, start + CHUNK)


def check_embeddings(embeddings: np.ndarray) -> None:
    """Raises ValueError unless embeddings are (N, D), finite and not zero."""
    if embeddings.ndim != 2:
        raise ValueError(
            "embeddings must be (utterances, dimensions), got shape "
            f"{embeddings.shape}"
        )
    norms = np.concatenate(
        [
            np.linalg.norm(np.asarray(embeddings[rows], np.float32), axis=1)
            for rows in chunks(len(embeddings))
        ]
    )
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(embeddings)} embeddings are NaN, infinite or "
            f"zero, the first at row {bad[0]}: the encoder may have diverged, "
            "or its input is broken there"
        )


def check_number(n_clusters: int, n_embeddings: int) -> None:
    """Raises ValueError if there are more clusters than utterances."""
    if n_clusters > n_embeddings:
        raise ValueError(
            f"n_clusters={n_clusters} is more than the {n_embeddings} "
            "utterances to cluster; lower n_clusters"
        )


def normalised(embeddings: np.ndarray) -> np.ndarray:
    """Returns embeddings (N, D) as float32 unit vectors; zeros stay zeros."""
    points = np.array(embeddings, dtype=np.float32, order="C")
    norms = np.linalg.norm(points, axis=1, keepdims=True)
    return np.divide(points, norms, out=points, where=norms > 0)


def joined(points: np.ndarray, others: np.ndarray, share: float) -> np.ndarray:
    """Concatenates two views of the same utterances, (N, D) and (N, D').

    Returns vectors (N, D + D'), float32. Their cosine is (1 - share) times that
    of `points` plus `share`, from 0 to 1, times that of `others`. They have
    unit length, or less where `others` is zero.
    """
    views = (1 - share, points), (share, others)
    return np.hstack([normalised(view) * weight**0.5 for weight, view in views])


def without_small(labels: np.ndarray, least: int) -> np.ndarray:
    """Returns labels (N,), -1 in clusters of fewer than `least` members.

    The other clusters are renumbered from 0 without gaps. Raises ValueError if
    no cluster is left.
    """
    sizes = np.bincount(labels)
    if sizes.max() < least:
        raise ValueError(
            f"min_cluster_size: no cluster has {least} utterances, the largest "
            f"has {sizes.max()}; lower it, or n_clusters"
        )
    large = sizes >= least
    return np.where(large, np.cumsum(large) - 1, -1)[labels]


def cluster_sizes(labels: np.ndarray, n_clusters: int) -> dict[str, float]:
    """Measures how even clusters are, by labels (N,) from 0.

    `largest_share` is the share of the utterances in the largest cluster.
    `empty_clusters` and `single_clusters` are the numbers of clusters with no
    and with one utterance.
    """
    sizes = np.bincount(np.asarray(labels), minlength=n_clusters)
    return {
        "largest_share": float(sizes.max() / sizes.sum()),
        "empty_clusters": int((sizes == 0).sum()),
        "single_clusters": int((sizes == 1).sum()),
    }


def largest_first(
    labels: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Renumbers labels (N,), from 0 without gaps, by descending cluster size.

    Each member counts by its weight (N,), by default 1.
    """
    order = np.argsort(-np.bincount(labels, weights), kind="stable")
    return np.argsort(order)[labels]


def sum_by_label(values: Tensor, labels: Tensor, n_labels: int) -> Tensor:
    """Returns the sums (n_labels, ...) of the rows (N, ...) of each label."""
    sums = values.new_zeros((n_labels, *values.shape[1:]))
    if values.device.type == "cpu":
        return sums.index_add_(0, labels, values)
    # On a GPU index_add_ adds in any order, so two runs would differ in the
    # last digit. index_put_ sorts the labels first.
    return sums.index_put_((labels,), values, accumulate=True)


@contextlib.contextmanager
def exact_matmul() -> Iterator[None]:
    """Disables TF32 in float32 products, whose error would decide near ties."""
    before = torch.get_float32_matmul_precision()
    # From torch 2.9 on, setting the precision sets the CPU's too. SpeechBrain
    # allows TF32 on GPUs only. Restoring "before" on the CPU too would make
    # training after a clustering round differently from a process that did
    # not cluster, such as a resumed one.
    cpu = getattr(torch.backends.mkldnn, "matmul", None)
    on_cpu = getattr(cpu, "fp32_precision", None)
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        if cpu is not None and on_cpu is not None:
            cpu.fp32_precision = on_cpu


def nearest_centroids(centroids: np.ndarray, device: str = "cpu") -> np.ndarray:
    """Returns the nearest other centroid of each of (K, dim), int64 (K,)."""
    points = torch.from_numpy(centroids).to(device)
    nearest = []
    with exact_matmul():
        for start in range(0, len(points), CENTROIDS):
            cosines = points[start : start + CENTROIDS] @ points.T
            itself = torch.arange(len(cosines), device=device)
            cosines[itself, start + itself] = -math.inf
            nearest.append(cosines.argmax(1))
    return torch.cat(nearest).cpu().numpy()
