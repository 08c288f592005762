"""Running statistics that outlive a training step gone wrong.

One NaN among a batch's activations makes the running mean and variance of all
batch normalisation behind it NaN for good: that step's gradient can be thrown
away, yet the encoder, which evaluates by these statistics, is lost.
"""

import contextlib

import torch
from torch.nn.modules.batchnorm import _BatchNorm


@contextlib.contextmanager
def finite_statistics(model):
    """Puts running statistics back if a training step spoils them.

    If any of them is not finite after the step, all are what they were before
    it. That is decided on the device: the host does not wait.

    Arguments
    ---------
    model : torch.nn.Module
        Of which all batch normalisation is watched.

    Example
    -------
    >>> norm = torch.nn.BatchNorm1d(2)
    >>> with finite_statistics(norm):
    ...     _ = norm(torch.tensor([[1.0, 2.0], [3.0, torch.nan]]))
    >>> norm.running_mean, norm.running_var
    (tensor([0., 0.]), tensor([1., 1.]))
    """
    statistics = [
        statistic
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        for statistic in (module.running_mean, module.running_var)
        if statistic is not None
    ]
    if not statistics:
        yield
        return
    before = torch.cat(statistics)
    yield
    after = torch.cat(statistics)
    kept = torch.where(after.isfinite().all(), after, before)
    sizes = [len(statistic) for statistic in statistics]
    for statistic, part in zip(statistics, kept.split(sizes)):
        statistic.copy_(part)
