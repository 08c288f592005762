"""Learning-rate schedules, and learning rates of groups of weights."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from lgl_plugin.nnet.momentum import cosine_ramp
from lgl_plugin.utils.checks import check_above0, check_share


@dataclasses.dataclass(eq=False)
class WarmupCosine:
    """A linear warm-up to the peak rate, then half a cosine down to its end.

    A call takes the finished share of the training, in [0, 1], over all its
    phases. The schedule needs no number of steps, so a longer training has the
    same shape. Goyal et al. 2017; Loshchilov and Hutter 2017.

    Arguments
    ---------
    lr : float
        Peak rate, above 0.
    warmup : float
        Share of the training at which the peak is reached, in [0, 1).
    final : float
        Rate at the end as a share of the peak, in [0, 1].

    Example
    -------
    >>> schedule = WarmupCosine(lr=0.001, warmup=0.1, final=0.01)
    >>> [round(schedule(done), 6) for done in (0.05, 0.1, 0.55, 1.0)]
    [0.0005, 0.001, 0.000505, 1e-05]
    """

    lr: float
    warmup: float = 0.05
    final: float = 0.01

    def __post_init__(self) -> None:
        check_above0(lr=self.lr)
        check_share(warmup=self.warmup)
        if not 0 <= self.final <= 1:
            raise ValueError(f"final must be in [0, 1], got {self.final}")

    def __call__(self, done: float) -> float:
        """Returns the rate; after the end (above 1) that of the end."""
        if done < self.warmup:
            return self.lr * done / self.warmup
        falling = (done - self.warmup) / (1 - self.warmup)
        return self.lr * cosine_ramp(1.0, self.final, falling)


class WarmupExponential(WarmupCosine):
    """A linear warm-up times an exponential decay from the first step on.

    wespeaker's ExponentialDecrease, with the arguments of `WarmupCosine`. The
    decay begins at `lr` and runs during the warm-up, so the peak is below `lr`.

    Example
    -------
    >>> schedule = WarmupExponential(lr=0.001, warmup=0.1, final=0.01)
    >>> [round(schedule(done), 6) for done in (0.05, 0.1, 0.55, 1.0)]
    [0.000397, 0.000631, 7.9e-05, 1e-05]
    """

    def __call__(self, done: float) -> float:
        """Returns the rate; after the end (above 1) that of the end."""
        rise = done / self.warmup if done < self.warmup else 1.0
        return self.lr * rise * self.final ** min(done, 1.0)


def lr_groups(
    given: Iterable[torch.nn.Parameter | dict],
    scales: dict[torch.nn.Parameter, float],
) -> list[dict]:
    """Splits an optimiser's parameters by their share of the learning rate.

    `given` holds parameters or groups, as an optimiser takes them; a group's
    other entries are kept. `scales` maps parameters to shares, 1 by default.
    Each share is multiplied by the `lr_scale` of its group, if the group has
    one. Groups come in descending order of their share.
    """
    groups: dict[tuple, dict] = {}
    for number, one in enumerate(given):
        whole: dict[str, Any] = {"params": [one]}
        if isinstance(one, dict):
            whole = one
        kind = number if isinstance(one, dict) else -1
        for parameter in whole["params"]:
            scale = scales.get(parameter, 1.0) * whole.get("lr_scale", 1.0)
            group = {**whole, "params": [], "lr_scale": scale}
            group = groups.setdefault((-scale, kind), group)
            group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]
