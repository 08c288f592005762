"""The latest embeddings of a training, with what they are of."""

import torch
from torch import Tensor, nn


class EmbeddingQueue(nn.Module):
    """First in, first out: embeddings and the groups that they are of.

    Buffers, so that a checkpoint has them: `groups`, int64 (capacity,), an
    utterance's or a cluster's number, -1 where nothing is held, and `vectors`,
    float32 (capacity, dim).
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
        """Puts embeddings (n, dim) of groups (n,) in; the oldest go."""
        capacity = len(self.groups)
        groups, vectors = groups[-capacity:], vectors[-capacity:]
        index = self.place + torch.arange(len(groups), device=groups.device)
        index %= capacity
        # One step that went wrong would spoil each that draws from it.
        sound = vectors.isfinite().all(1)
        self.groups[index] = torch.where(sound, groups, -1)
        self.vectors[index] = torch.where(sound[:, None], vectors.float(), 0.0)
        self.place.copy_((self.place + len(groups)) % capacity)
