"""Losses without negatives: two views alike, and dimensions that differ.

VICReg, Barlow Twins and SimSiam, computed in float32 under autocast too, over
the batch of all processes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lgl_plugin.utils.distributed import all_gather_with_grad


def vicreg_terms(
    first: Tensor, second: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns VICReg's three terms (Bardes et al. 2022), without weights.

    Of projections (batch, D) of two views of the same utterances: the mean
    squared difference; how far deviations fall short of 1, in the mean over
    dimensions; and the squares of the covariances of each two dimensions, over
    D. The latter two are of both views in sum.
    """
    with torch.autocast(first.device.type, enabled=False):
        one, other = (
            all_gather_with_grad(first.float()),
            all_gather_with_grad(second.float()),
        )
        variance, covariance = _spread(one)
        further, more = _spread(other)
        invariance = F.mse_loss(one, other)
    return invariance, variance + further, covariance + more


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

    The correlation over the batch of two views' projections, (batch, D), is to
    be the identity; `redundancy` weighs the correlations of two dimensions.
    """
    with torch.autocast(first.device.type, enabled=False):
        views = [all_gather_with_grad(view.float()) for view in (first, second)]
        # As batch normalisation without weights; 1e-5 as there.
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
