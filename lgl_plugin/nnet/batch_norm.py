"""Protects the running statistics of batch normalisation from a bad step.

One NaN among a batch's activations makes the running mean and variance of all
later batch normalisation NaN. The step's gradient can be skipped, but the
statistics would stay NaN. The encoder evaluates by them and would be lost.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

from lgl_plugin.utils.distributed import world_size


@contextlib.contextmanager
def finite_statistics(model: torch.nn.Module) -> Iterator[None]:
    """Restores all running statistics if a training step spoils one."""
    statistics = _statistics(model)
    if not statistics:
        yield
        return
    before = torch.cat(statistics)
    yield
    after = torch.cat(statistics)
    # torch.where decides on the device: an `if` would make the host wait.
    kept = torch.where(after.isfinite().all(), after, before)
    sizes = [len(statistic) for statistic in statistics]
    torch._foreach_copy_(statistics, list(kept.split(sizes)))


def share_statistics(model: torch.nn.Module) -> None:
    """Gives all processes the running statistics of the first.

    On CPUs each process has its own statistics, so its embeddings would differ
    from those of other processes.
    """
    if world_size() > 1:
        for statistic in _statistics(model):
            dist.broadcast(statistic, 0)


def batch_norms(model: torch.nn.Module) -> list[_BatchNorm]:
    """Lists a model's layers of batch normalisation."""
    return [part for part in model.modules() if isinstance(part, _BatchNorm)]


def _statistics(model):
    """Lists the running means and variances of a model."""
    return [
        statistic
        for module in batch_norms(model)
        for statistic in (module.running_mean, module.running_var)
        if statistic is not None
    ]
