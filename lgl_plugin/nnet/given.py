"""Keeps utterances whose label a user gave from rejection by a gate."""

import torch
from torch import Tensor


class GivenRows(torch.nn.Module):
    """Lets utterances whose label a user gave through any gate.

    `given`, bool (N,), marks them among the manifest's rows.

    A label correction changes rejected utterances alone, so it leaves these.
    """

    def __init__(self, given: Tensor):
        super().__init__()
        # In no checkpoint: a resumed run reads the same file again.
        self.given = torch.nn.Buffer(given, persistent=False)

    def forward(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Returns a gate's mask or weights (batch,), 1 for given labels."""
        return weights.masked_fill(self.given[rows], 1)
