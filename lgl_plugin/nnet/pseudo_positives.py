"""Positives of other utterances, for contrastive learning."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from lgl_plugin.clustering.vectors import exact_matmul
from lgl_plugin.nnet.queue import EmbeddingQueue

# Centroids that are compared with all others at once: 100 MB at 25,000.
CHUNK = 1024
CAPACITY = 25000  # embeddings that the queue holds, for VoxCeleb2


class PseudoPositives(nn.Module):
    """Self-supervised positive sampling, SSPS (Lepage and Dehak 2025).

    The two crops of an utterance share speaker, room and microphone, and a
    network may tell utterances by the latter. Here an anchor's positive comes
    from another utterance, often of the same speaker elsewhere: one of the
    anchor's own cluster, or of the cluster nearest to that. `regroup` gives
    the clusters, and a queue holds the latest embeddings, whose gradient is
    not known any more.

    Maps rows (B,), int64, of a batch's utterances to the rows (B,) of their
    positives, -1 where the queue holds none, and to their embeddings (B, dim),
    float32. A cluster's held utterances are equally likely.

    Arguments
    ---------
    n_utterances : int
        Number of rows.
    dim : int
        Of an embedding.

    Attributes
    ---------
    clusters, sources : torch.Tensor
        Each row's cluster and the cluster that its positives come from (N,),
        int64; -1 for none.
    queue : lgl_plugin.nnet.queue.EmbeddingQueue
        What positives are drawn from.

    Example
    -------
    >>> positives = PseudoPositives(4, dim=2)
    >>> vectors = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.1, 0.9], [0.0, 1.0]])
    >>> clusters = np.array([0, 0, 1, 1])
    >>> positives.regroup(clusters, 1 - clusters, range(4))  # of the other
    >>> positives(torch.tensor([0]))[0]  # the queue is empty
    tensor([-1])
    >>> positives.queue.add(torch.tensor([1, 2]), vectors[1:3])
    >>> positives(torch.tensor([0, 3]))
    (tensor([2, 1]), tensor([[0.1000, 0.9000],
            [0.9000, 0.1000]]))
    """

    def __init__(self, n_utterances: int, dim: int) -> None:
        super().__init__()
        # Of a smaller corpus an epoch, so that nothing older is held.
        capacity = min(CAPACITY, n_utterances)
        none = torch.full((n_utterances,), -1)
        self.clusters = nn.Buffer(none)
        self.sources = nn.Buffer(none.clone())
        self.queue = EmbeddingQueue(capacity, dim)

    def regroup(
        self, clusters: np.ndarray, sources: np.ndarray, rows: np.ndarray
    ) -> None:
        """Takes new clusters and sources (n,), int64, of rows (n,)."""
        index = torch.as_tensor(rows, device=self.clusters.device)
        for held, new in ((self.clusters, clusters), (self.sources, sources)):
            held.fill_(-1)
            held[index] = torch.from_numpy(new).to(held.device)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Draws a positive for each row, without making the host wait."""
        known = self.queue.rows
        held = torch.where(known >= 0, self.clusters[known], -1)
        wanted = self.sources[rows, None]
        fits = (held == wanted) & (wanted >= 0) & (known != rows[:, None])
        count = fits.cumsum(1, dtype=torch.int32)
        n_fits = count[:, -1]
        # One draw for each row, of the number of those that fit.
        drawn = torch.rand(len(rows), device=rows.device) * n_fits
        index = (count <= drawn.int()[:, None]).sum(1)
        index = index.clamp(max=len(known) - 1)  # where none fits
        chosen = torch.where(n_fits > 0, known[index], -1)
        return chosen, self.queue.vectors[index]


def nearest_clusters(centroids: np.ndarray, device: str = "cpu") -> np.ndarray:
    """Returns for each centroid (K, dim) the nearest other: int64 (K,)."""
    points = torch.from_numpy(centroids).to(device)
    nearest = []
    with exact_matmul():
        for start in range(0, len(points), CHUNK):
            cosines = points[start : start + CHUNK] @ points.T
            itself = torch.arange(len(cosines), device=device)
            cosines[itself, start + itself] = -math.inf
            nearest.append(cosines.argmax(1))
    return torch.cat(nearest).cpu().numpy()
