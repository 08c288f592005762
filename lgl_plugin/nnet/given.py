"""Utterances that a gate cannot reject, for their labels are given."""

from __future__ import annotations

import torch


class GivenRows(torch.nn.Module):
    """Lets utterances with given labels through whatever gate there is.

    A label correction changes rejected utterances alone, so it leaves these.

    Arguments
    ---------
    given : torch.Tensor
        Whether the label of each row of the manifest is given, bool (N,).

    Example
    -------
    >>> keep = GivenRows(torch.tensor([True, False, False]))
    >>> rows, gated = torch.tensor([2, 0, 1]), torch.tensor([False] * 3)
    >>> keep(rows, gated)
    tensor([False,  True, False])
    """

    given: torch.Tensor

    def __init__(self, given: torch.Tensor):
        super().__init__()
        # Of no checkpoint: a run that goes on reads the same file again.
        self.register_buffer("given", given, persistent=False)

    def forward(
        self, rows: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Returns a gate's mask or weights (batch,), 1 where labels are given.

        `rows` are those of the batch in the manifest, int64 (batch,).
        """
        return weights.masked_fill(self.given[rows], 1)
