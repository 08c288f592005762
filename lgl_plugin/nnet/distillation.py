"""Losses of DINO and SDPN, and the regularisers that prevent a collapse.

All are computed in float32, under autocast too. Logits are cosines to
prototypes. Values cover the batches of all processes where a docstring says so.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lgl_plugin.utils.distributed import all_gather, all_gather_with_grad, rank

TINY = torch.finfo(torch.float32).tiny


def cross_entropy(
    targets: Tensor, logits: Tensor, temperature: float
) -> Tensor:
    """Returns the mean cross entropy of targets and softmax of logits.

    Targets are probabilities (..., K); logits, which are divided by
    `temperature`, have that shape or broadcast to it.
    """
    logs = F.log_softmax(logits.float() / temperature, dim=-1)
    return -(targets * logs).sum(-1).mean()


def dino_loss(targets: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Returns DINO's loss: each view predicts the other global views' targets.

    `targets` (G, batch, K) are the teacher's probabilities of the global views.
    `logits` (V, batch, K) are the student's of all views, the same global views
    first.
    """
    logs = F.log_softmax(logits.float() / temperature, dim=-1)
    with torch.autocast(logs.device.type, enabled=False):
        pairs = -torch.einsum("gbk,vbk->gv", targets, logs) / logs.shape[1]
    n_pairs = pairs.numel() - min(pairs.shape)
    return (pairs.sum() - pairs.diagonal().sum()) / n_pairs


@torch.no_grad()
def sinkhorn(
    probabilities: Tensor, others: Tensor | None = None, n_iterations: int = 3
) -> Tensor:
    """Spreads a batch evenly over prototypes (Sinkhorn and Knopp 1967).

    `probabilities` (batch, K), above 0, are those of one process; the batches
    of all processes have one size. `others` (n, K), the same on each process,
    are spread together with the batch, because a batch of fewer utterances than
    prototypes cannot use all prototypes. The result (batch, K) has no graph.
    Each row sums to 1. All columns, over all processes and `others`, have about
    the same sum. A row of zeros stays zero.
    """
    shares = all_gather(probabilities.float())
    if others is not None:
        shares = torch.cat([shares, others.float()])
    for _ in range(n_iterations):
        # The clamps prevent 0 / 0: an empty place of a queue is a row of zeros.
        shares = shares / shares.sum(0).clamp(min=TINY)
        shares = shares / shares.sum(1, keepdim=True).clamp(min=TINY)
    first = rank() * len(probabilities)
    return shares[first : first + len(probabilities)]


def entropy(probabilities: Tensor) -> Tensor:
    """Returns the entropy of probabilities (..., K) in nats, (...)."""
    return torch.special.entr(probabilities).sum(-1)


@torch.no_grad()
def prototype_figures(targets: Tensor) -> dict[str, Tensor]:
    """Measures how targets (..., K) use the prototypes.

    `teacher_entropy` is the mean entropy of a target as a share of log K: 1 if
    all prototypes are equally likely, 0 if one has all probability.
    `prototypes_used` is the exponential of the entropy of the mean target of
    all processes.
    """
    targets = targets.flatten(0, -2)
    max_entropy = math.log(targets.shape[1])
    mean = all_gather(targets.mean(0, keepdim=True)).mean(0)
    return {
        "teacher_entropy": entropy(targets).mean() / max_entropy,
        "prototypes_used": entropy(mean).exp(),
    }


def mean_entropy_gap(probabilities: Tensor) -> Tensor:
    """Returns log K minus the entropy of the mean probabilities: me-max.

    Assran et al. 2022. The mean of the student's probabilities (..., K) is that
    of all processes. The value is 0 if all prototypes are used equally, and log
    K if one is used.
    """
    mean = all_gather_with_grad(
        probabilities.flatten(0, -2).mean(0, keepdim=True)
    ).mean(0)
    # At 0 the entropy's slope is infinite, and the gradient would be NaN.
    return math.log(len(mean)) - entropy(mean.clamp(min=TINY))


def koleo(embeddings: Tensor) -> Tensor:
    """Returns the Kozachenko-Leonenko regulariser (Sablayrolles et al. 2019).

    This is the mean of -log of each embedding's distance to its nearest
    neighbour at unit length, within the process's batch (batch, dim) of two or
    more. It pushes neighbours apart.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        units = F.normalize(embeddings.float(), dim=1)
        with torch.no_grad():
            cosines = units @ units.T
            nearest = cosines.fill_diagonal_(-math.inf).argmax(1)
        # The small summand keeps the gradient finite if two embeddings are
        # equal.
        distances = (units - units[nearest] + 1e-8).norm(dim=1)
        return -(distances + 1e-8).log().mean()


def dimension_regularisation(vectors: Tensor) -> Tensor:
    """Returns the Frobenius regulariser of SDPN's dimensions.

    This is half the log of the squared Frobenius norm of the matrix of cosines
    between dimensions, over the vectors (batch, D) of all processes. The value
    is log(D) / 2 if dimensions are uncorrelated, and log D if all are the same.
    """
    return 0.5 * _squared_cosines(vectors).sum().log()


def off_diagonal_regularisation(vectors: Tensor) -> Tensor:
    """Returns the off-diagonal regulariser of SDPN's dimensions.

    This is the sum of the squared cosines between distinct dimensions, divided
    by D, over the vectors (batch, D) of all processes. The value is 0 if
    dimensions are uncorrelated, and D - 1 if all are the same. Unlike that of
    the Frobenius form, the gradient grows with the correlation.
    """
    squares = _squared_cosines(vectors)
    return (squares.sum() - squares.diagonal().sum()) / len(squares)


def _squared_cosines(vectors):
    """Returns the squared cosines between dimensions, (D, D)."""
    with torch.autocast(vectors.device.type, enabled=False):
        columns = F.normalize(all_gather_with_grad(vectors.float()), dim=0)
        return (columns.T @ columns).square()
