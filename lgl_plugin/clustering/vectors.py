"""Helpers on embeddings and labels that the clusterings share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

# Rows that are normalised and assigned at once: 50 MB at 192 dimensions.
CHUNK = 65536


def chunks(n: int) -> Iterator[slice]:
    """Yields slices of at most `CHUNK` rows that cover n rows."""
    for start in range(0, n, CHUNK):
        yield slice(start, start + CHUNK)


def normalised(embeddings: np.ndarray) -> np.ndarray:
    """Returns embeddings (N, D), none of length 0, as float32 unit vectors."""
    points = np.array(embeddings, dtype=np.float32, order="C")
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    return points


def sum_by_label(
    values: torch.Tensor, labels: torch.Tensor, n_labels: int
) -> torch.Tensor:
    """Returns the sums (n_labels, ...) of the rows (N, ...) of each label."""
    sums = values.new_zeros((n_labels, *values.shape[1:]))
    if values.device.type == "cpu":
        return sums.index_add_(0, labels, values)
    # On a GPU index_add_ adds in any order, and two runs would differ in the
    # last digit; index_put_ sorts the labels first.
    return sums.index_put_((labels,), values, accumulate=True)


@contextlib.contextmanager
def exact_matmul() -> Iterator[None]:
    """Switches off TF32 in float32 products: it would decide near ties."""
    before = torch.get_float32_matmul_precision()
    # From torch 2.9 on, setting the precision sets the CPU's too. SpeechBrain
    # allows TF32 on GPUs alone; were "before" restored on the CPU as well,
    # training after a clustering would round otherwise than in a process that
    # did not cluster, such as a resumed one.
    cpu = getattr(torch.backends.mkldnn, "matmul", None)
    on_cpu = getattr(cpu, "fp32_precision", None)
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        if cpu is not None and on_cpu is not None:
            cpu.fp32_precision = on_cpu
