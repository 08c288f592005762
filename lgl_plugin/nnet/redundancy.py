"""Losses without negatives: VICReg, Barlow Twins and SimSiam.

All are computed in float32, under autocast too. VICReg and Barlow Twins use the
batch of all processes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lgl_plugin.utils.distributed import all_gather_with_grad


def vicreg_terms(
    first: Tensor, second: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns invariance, variance and covariance of VICReg, without weights.

    Bardes et al. 2022. `first` and `second` (batch, D) are projections of two
    views of the same utterances. Invariance is the mean squared difference of
    the views. Variance is the mean over dimensions of max(0, 1 - deviation).
    Covariance is the sum of the squared covariances of distinct dimensions,
    divided by D. Variance and covariance are summed over both views.
    """
    with torch.autocast(first.device.type, enabled=False):
        one, other = (
            all_gather_with_grad(first.float()),
            all_gather_with_grad(second.float()),
        )
        variance, covariance = _spread(one)
        variance_other, covariance_other = _spread(other)
        invariance = F.mse_loss(one, other)
    return invariance, variance + variance_other, covariance + covariance_other


def spread_terms(view: Tensor) -> tuple[Tensor, Tensor]:
    """Returns VICReg's variance and covariance of one view (batch, D)."""
    with torch.autocast(view.device.type, enabled=False):
        return _spread(all_gather_with_grad(view.float()))


def _spread(view):
    deviation = (view.var(dim=0) + 1e-4).sqrt()
    # torch.cov would make a GPU's host wait.
    centred = view - view.mean(0)
    squares = (centred.T @ centred / (len(view) - 1)).square()
    off_diagonal = squares.sum() - squares.diagonal().sum()
    return F.relu(1 - deviation).mean(), off_diagonal / view.shape[1]


def barlow_twins_loss(
    first: Tensor, second: Tensor, redundancy: float = 0.005
) -> Tensor:
    """Returns the loss of Barlow Twins (Zbontar et al. 2021).

    The cross-correlation of the two views' projections (batch, D) over the
    batch must be the identity. `redundancy` is the weight of the off-diagonal
    entries.
    """
    with torch.autocast(first.device.type, enabled=False):
        views = [all_gather_with_grad(view.float()) for view in (first, second)]
        # Batch normalisation without weights, with torch's eps.
        a, b = (
            (view - view.mean(0)) / (view.var(0, correction=0) + 1e-5).sqrt()
            for view in views
        )
        correlation = a.T @ b / len(a)
        on = correlation.diagonal()
        off = correlation.square().sum() - on.square().sum()
        return (1 - on).square().sum() + redundancy * off


def negative_cosine(predicted: Tensor, target: Tensor) -> Tensor:
    """Returns minus the mean cosine; the target (batch, D) has no gradient."""
    cosines = F.cosine_similarity(predicted.float(), target.detach().float())
    return -cosines.mean()
