"""Exempts utterances whose label a user gave from the gate."""

import torch
from torch import Tensor


class GivenRows(torch.nn.Module):
    """Lets utterances whose label a user gave through any gate.

    `given`, bool (N,), marks these utterances among the manifest's rows. A
    label correction changes only rejected utterances, so given labels never
    change.
    """

    def __init__(self, given: Tensor):
        super().__init__()
        # Not in checkpoints: a resumed run reads the labels again.
        self.given = torch.nn.Buffer(given, persistent=False)

    def forward(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Returns a gate's mask or weights (batch,), 1 for given labels."""
        return weights.masked_fill(self.given[rows], 1)
