"""Losses of self-distillation: DINO, SDPN and what keeps both from collapse.

Computed in float32 under autocast too. Logits are cosines to prototypes.
Figures for the whole batch are those of all processes, where it says so.
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
    """Returns DINO's loss: a view has the target of each other global view.

    `targets` are the teacher's probabilities of the global views, (G, batch,
    K); `logits` the student's of all views, the same global ones first, (V,
    batch, K).
    """
    logs = F.log_softmax(logits.float() / temperature, dim=-1)
    with torch.autocast(logs.device.type, enabled=False):
        pairs = -torch.einsum("gbk,vbk->gv", targets, logs) / logs.shape[1]
    others = pairs.numel() - min(pairs.shape)
    return (pairs.sum() - pairs.diagonal().sum()) / others


@torch.no_grad()
def sinkhorn(
    probabilities: Tensor, others: Tensor | None = None, n_iterations: int = 3
) -> Tensor:
    """Spreads a batch evenly over prototypes (Sinkhorn and Knopp 1967).

    Takes probabilities above 0, (batch, K), the batch of each process, of one
    size. `others` (n, K), the same on each process, share the prototypes: a
    batch of fewer utterances than prototypes cannot use all. In what is
    returned, which has no graph, each row sums to 1, and all columns, over all
    processes and `others`, to about the same. A row of zeros stays.
    """
    shares = all_gather(probabilities.float())
    if others is not None:
        shares = torch.cat([shares, others.float()])
    for _ in range(n_iterations):
        # A row of zeros is a place in a queue that nothing has filled yet.
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

    `teacher_entropy` is that of a target in the mean, as a share of log K: 1
    where the teacher says nothing, 0 where it names one prototype.
    `prototypes_used` is the exponential of the entropy of the mean target of
    all processes.
    """
    targets = targets.flatten(0, -2)
    most = math.log(targets.shape[1])
    mean = all_gather(targets.mean(0, keepdim=True)).mean(0)
    return {
        "teacher_entropy": entropy(targets).mean() / most,
        "prototypes_used": entropy(mean).exp(),
    }


def mean_entropy_gap(probabilities: Tensor) -> Tensor:
    """Returns log K less the entropy of the batch's mean: me-max.

    Assran et al. 2022. Of the student's probabilities (..., K): 0 where all
    prototypes are used alike, log K where one is; the mean is that of all
    processes.
    """
    mean = all_gather_with_grad(
        probabilities.flatten(0, -2).mean(0, keepdim=True)
    ).mean(0)
    # At 0 the entropy's slope is infinite, and the gradient would be NaN.
    return math.log(len(mean)) - entropy(mean.clamp(min=TINY))


def koleo(embeddings: Tensor) -> Tensor:
    """Returns the Kozachenko-Leonenko regulariser (Sablayrolles et al. 2019).

    The mean of -log of each embedding's distance to its nearest neighbour in
    the process's batch (batch, dim), two or more, at unit length: it pushes
    neighbours apart.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        units = F.normalize(embeddings.float(), dim=1)
        with torch.no_grad():
            cosines = units @ units.T
            nearest = cosines.fill_diagonal_(-math.inf).argmax(1)
        # The small summand keeps the gradient of two equal points finite.
        distances = (units - units[nearest] + 1e-8).norm(dim=1)
        return -(distances + 1e-8).log().mean()


def dimension_regularisation(vectors: Tensor) -> Tensor:
    """Returns the Frobenius regulariser of SDPN's dimensions.

    Half the log of the squared norm of the matrix of cosines between
    dimensions, over the vectors (batch, D) of all processes: log(D) / 2 where
    dimensions are uncorrelated, log D where they are one.
    """
    return 0.5 * _squared_cosines(vectors).sum().log()


def off_diagonal_regularisation(vectors: Tensor) -> Tensor:
    """Returns the off-diagonal regulariser of SDPN's dimensions.

    The squared cosines of each two dimensions in sum, over D and the vectors
    (batch, D) of all processes: 0 where dimensions are uncorrelated, D - 1
    where they are one. Unlike the Frobenius form it pulls harder the worse they
    are.
    """
    squares = _squared_cosines(vectors)
    return (squares.sum() - squares.diagonal().sum()) / len(squares)


def _squared_cosines(vectors):
    """Returns the squared cosines between dimensions, (D, D)."""
    with torch.autocast(vectors.device.type, enabled=False):
        columns = F.normalize(all_gather_with_grad(vectors.float()), dim=0)
        return (columns.T @ columns).square()
