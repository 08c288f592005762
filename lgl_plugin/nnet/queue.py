"""The latest embeddings of a training, with the utterances that they are of."""

import torch
from torch import Tensor, nn


class EmbeddingQueue(nn.Module):
    """First in, first out: rows of utterances and their embeddings.

    Buffers, so that a checkpoint has them: `rows` of the manifest, int64
    (capacity,), -1 where nothing is held, and `vectors`, float32 (capacity,
    dim).
    """

    def __init__(self, capacity: int, dim: int) -> None:
        super().__init__()
        self.rows = nn.Buffer(torch.full((capacity,), -1))
        self.vectors = nn.Buffer(torch.zeros(capacity, dim))
        self.place = nn.Buffer(torch.tensor(0))

    @torch.no_grad()
    def add(self, rows: Tensor, vectors: Tensor) -> None:
        """Puts embeddings (n, dim) of rows (n,) in; the oldest go."""
        capacity = len(self.rows)
        rows, vectors = rows[-capacity:], vectors[-capacity:]
        index = self.place + torch.arange(len(rows), device=rows.device)
        index %= capacity
        # One step that went wrong would spoil each that draws from it.
        sound = vectors.isfinite().all(1)
        self.rows[index] = torch.where(sound, rows, -1)
        self.vectors[index] = torch.where(sound[:, None], vectors.float(), 0.0)
        self.place.copy_((self.place + len(rows)) % capacity)
