"""A teacher: a copy of a network that follows it slowly."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn


class MomentumCopy(nn.Module):
    """A copy of a module whose weights are a moving average of the module's.

    The teacher of MoCo, BYOL, DINO and SDPN. Its weights take no gradient.

    Arguments
    ---------
    module : torch.nn.Module
        What is copied, weights included.
    buffers : bool
        Whether running statistics of batch normalisation follow, too, and are
        what it normalises by. Otherwise it normalises by the batch at hand, as
        the module does in training.

    Example
    -------
    >>> student = torch.nn.Linear(1, 1, bias=False)
    >>> teacher = MomentumCopy(student)
    >>> _ = torch.nn.init.zeros_(teacher.copy.weight)
    >>> _ = torch.nn.init.ones_(student.weight)
    >>> teacher.follow(student, momentum=0.9)
    >>> round(teacher(torch.ones(1, 1)).item(), 3)
    0.1
    """

    def __init__(self, module: nn.Module, buffers: bool = False) -> None:
        super().__init__()
        self.copy = copy.deepcopy(module).requires_grad_(False)
        self.buffers_follow = buffers

    def train(self, mode: bool = True) -> MomentumCopy:
        """Sets the mode; running statistics hold in both, if they follow."""
        return super().train(mode and not self.buffers_follow)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the copy."""
        return self.copy(*args, **kwargs)

    @torch.no_grad()
    def follow(self, module: nn.Module, momentum: float) -> None:
        """Keeps the share `momentum`, and takes the rest from the module."""
        own, new = list(self.copy.parameters()), list(module.parameters())
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = list(zip(own, new))
        if self.buffers_follow:
            pairs += zip(self.copy.buffers(), module.buffers())
        # Counters, such as that of batches, are copied.
        averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        mine, others = (list(tensors) for tensors in zip(*averaged))
        torch._foreach_lerp_(mine, others, 1 - momentum)
        for held, other in pairs:
            if not held.is_floating_point():
                held.copy_(other)


def cosine_ramp(start: float, end: float, done: float) -> float:
    """Returns a value that goes from start to end by half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
