"""A momentum teacher: a moving average of a network's weights."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn


class MomentumCopy(nn.Module):
    """A copy of a module whose weights are a moving average of the module's.

    The teacher of MoCo, BYOL, DINO and SDPN. Its weights take no gradient.

    Arguments
    ---------
    module : torch.nn.Module
        The module to copy, with its weights.
    buffers : bool
        True: running statistics of batch normalisation are averaged, too, and
        the copy normalises by them. False: the copy normalises by the current
        batch, as the module does in training.

    Example
    -------
    >>> student = torch.nn.Linear(1, 1, bias=False)
    >>> teacher = MomentumCopy(student)
    >>> _ = torch.nn.init.zeros_(teacher.copy.weight)
    >>> _ = torch.nn.init.ones_(student.weight)
    >>> teacher.follow(student, momentum=0.9, skipped=torch.tensor(0.0))
    >>> round(teacher(torch.ones(1, 1)).item(), 3)
    0.1
    """

    def __init__(self, module: nn.Module, buffers: bool = False) -> None:
        super().__init__()
        self.copy = copy.deepcopy(module).requires_grad_(False)
        self.buffers_follow = buffers

    def train(self, mode: bool = True) -> MomentumCopy:
        """Sets the mode; a copy that averages statistics stays in eval."""
        return super().train(mode and not self.buffers_follow)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the copy."""
        return self.copy(*args, **kwargs)

    @torch.no_grad()
    def follow(
        self, module: nn.Module, momentum: float, skipped: Tensor
    ) -> None:
        """Moves the copy towards the module.

        Each weight becomes `momentum` times itself plus 1 - `momentum` times
        the module's. `skipped`, a scalar on the device, is 1 if the training
        step was skipped: the copy then stays unchanged, too.
        """
        pairs = zip(self.copy.parameters(), module.parameters(), strict=True)
        own, new = (list(tensors) for tensors in zip(*pairs))
        if self.buffers_follow:
            mine, others = self.copy.buffers(), module.buffers()
            for held, other in zip(mine, others, strict=True):
                if held.is_floating_point():
                    own.append(held)
                    new.append(other)
                else:  # a counter, such as that of batches
                    held.copy_(other)
        change = torch._foreach_sub(new, own)
        taken = (1 - momentum) * (1 - skipped)
        torch._foreach_mul_(change, taken)
        torch._foreach_add_(own, change)


def cosine_ramp(start: float, end: float, done: float) -> float:
    """Interpolates from start to end by half a cosine; `done` is in [0, 1]."""
    return end + (start - end) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
