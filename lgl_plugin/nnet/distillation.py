"""Losses of self-distillation: DINO, SDPN and what keeps both from collapse.

Computed in float32 under autocast too. Logits are cosines to prototypes.
Figures for the whole batch are those of all processes, where it says so.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lgl_plugin.utils.distributed import concatenated, gathered, rank

TINY = torch.finfo(torch.float32).tiny


def cross_entropy(
    targets: Tensor, logits: Tensor, temperature: float
) -> Tensor:
    """Returns the mean cross entropy of targets and softmax of logits.

    Arguments
    ---------
    targets : torch.Tensor
        Probabilities (..., K).
    logits : torch.Tensor
        Of the same shape, or one that broadcasts to it.
    temperature : float
        What logits are divided by.

    Example
    -------
    >>> uniform = torch.full((1, 2), 0.5)
    >>> round(cross_entropy(uniform, torch.zeros(1, 2), 0.1).item(), 4)
    0.6931
    """
    logs = F.log_softmax(logits.float() / temperature, dim=-1)
    return -(targets * logs).sum(-1).mean()


def dino_loss(targets: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Returns DINO's loss: a view has the target of each other global view.

    Arguments
    ---------
    targets : torch.Tensor
        The teacher's probabilities of the global views, (G, batch, K).
    logits : torch.Tensor
        The student's of all views, the same global ones first, (V, batch, K).
    temperature : float
        Of the student.

    Example
    -------
    >>> targets = torch.eye(2)[:, None]  # two views of one utterance
    >>> round(dino_loss(targets, 10 * targets.flip(0), 1.0).item(), 4)
    0.0
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

    Arguments
    ---------
    probabilities : torch.Tensor
        Above 0, (batch, K); the batch of each process, of one size.
    others : torch.Tensor, optional
        Further ones (n, K), the same on each process, that share the
        prototypes: a batch of fewer utterances than prototypes cannot use all.
    n_iterations : int
        How often columns, then rows, are scaled.

    Returns
    -------
    torch.Tensor
        Of the same shape: each row sums to 1, and all columns, over all
        processes and `others`, to about the same. A row of zeros stays. It
        has no graph.

    Example
    -------
    >>> even = sinkhorn(torch.tensor([[0.9, 0.1], [0.8, 0.2]]))
    >>> even.sum(0)
    tensor([1.0000, 1.0000])
    """
    shares = concatenated(probabilities.float())
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


def mean_entropy_gap(probabilities: Tensor) -> Tensor:
    """Returns log K less the entropy of the batch's mean: me-max.

    Assran et al. 2022. 0 where all prototypes are used alike, log K where one
    is; the mean is that of all processes.

    Arguments
    ---------
    probabilities : torch.Tensor
        The student's, (..., K).

    Example
    -------
    >>> mean_entropy_gap(torch.eye(4)).item()
    0.0
    """
    mean = gathered(probabilities.flatten(0, -2).mean(0, keepdim=True)).mean(0)
    return math.log(len(mean)) - entropy(mean)


def koleo(embeddings: Tensor) -> Tensor:
    """Returns the Kozachenko-Leonenko regulariser (Sablayrolles et al. 2019).

    The mean of -log of each embedding's distance to its nearest neighbour in
    the process's batch, at unit length: it pushes neighbours apart.

    Arguments
    ---------
    embeddings : torch.Tensor
        Two or more, (batch, dim).

    Example
    -------
    >>> round(koleo(torch.tensor([[1.0], [-1.0]])).item(), 3)  # -log 2
    -0.693
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
    dimensions, over the vectors of all processes: log(D) / 2 where dimensions
    are uncorrelated, log D where they are one.

    Arguments
    ---------
    vectors : torch.Tensor
        Not normalised, (batch, D).

    Example
    -------
    >>> round(dimension_regularisation(torch.eye(64)).item(), 3)
    2.079
    """
    return 0.5 * _squared_cosines(vectors).sum().log()


def off_diagonal_regularisation(vectors: Tensor) -> Tensor:
    """Returns the off-diagonal regulariser of SDPN's dimensions.

    The squared cosines of each two dimensions in sum, over D and the vectors
    of all processes: 0 where dimensions are uncorrelated, D - 1 where they are
    one. Unlike the Frobenius form it pulls harder the worse they are.

    Arguments
    ---------
    vectors : torch.Tensor
        Not normalised, (batch, D).

    Example
    -------
    >>> round(off_diagonal_regularisation(torch.ones(2, 64)).item(), 3)
    63.0
    """
    squares = _squared_cosines(vectors)
    return (squares.sum() - squares.diagonal().sum()) / len(squares)


def _squared_cosines(vectors):
    """Returns the squared cosines between dimensions, (D, D)."""
    with torch.autocast(vectors.device.type, enabled=False):
        columns = F.normalize(gathered(vectors.float()), dim=0)
        return (columns.T @ columns).square()
