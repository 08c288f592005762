"""A queue of a training's latest embeddings."""

import torch
from torch import Tensor, nn


class EmbeddingQueue(nn.Module):
    """A first-in-first-out queue of embeddings and of their groups.

    A checkpoint contains its buffers: `groups`, int64 (capacity,), the number
    of an utterance or a cluster, -1 for an empty place, and `vectors`, float32
    (capacity, dim).
    """

    def __init__(self, capacity: int, dim: int) -> None:
        super().__init__()
        self.groups = nn.Buffer(torch.full((capacity,), -1))
        self.vectors = nn.Buffer(torch.zeros(capacity, dim))
        self.place = nn.Buffer(torch.tensor(0))

    def clear(self) -> None:
        """Empties the queue."""
        self.groups.fill_(-1)

    @torch.no_grad()
    def add(self, groups: Tensor, vectors: Tensor) -> None:
        """Adds embeddings (n, dim) of groups (n,), in place of the oldest."""
        capacity = len(self.groups)
        groups, vectors = groups[-capacity:], vectors[-capacity:]
        index = self.place + torch.arange(len(groups), device=groups.device)
        index %= capacity
        # A non-finite embedding would spoil every step that uses the queue.
        finite = vectors.isfinite().all(1)
        self.groups[index] = torch.where(finite, groups, -1)
        self.vectors[index] = torch.where(finite[:, None], vectors.float(), 0.0)
        self.place.copy_((self.place + len(groups)) % capacity)
