"""Loss gates: masks of the utterances whose pseudo-label is trusted.

A network fits reliable pseudo-labels faster, so a small loss suggests a right
label (paper, section 3). Gates differ in how they set their threshold tau. With
several processes, give each gate the epoch's losses of all processes, so that
all gates have the same tau. An argument out of range raises ValueError.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lgl_plugin.nnet.mixture import density_crossing, fit_mixture
from lgl_plugin.utils.checks import check_above0, check_from, check_share

LOWEST = 1e-3  # smallest loss that enters a mixture


class Gate(nn.Module):
    """A gate that selects the utterances whose loss is at most tau.

    The base of all gates (paper, eq. 3) maps losses (batch,), float32, to a
    mask (batch,), bool, or to weights in [0, 1], float32. A weight above one
    half counts as selected. Call `start_iteration` (from 1) before training on
    new pseudo-labels. Call `end_epoch` after each epoch with the losses (N,) of
    all its utterances, rejected ones too. The buffer `tau` is part of a
    checkpoint; when resuming, call `start_iteration` before loading the
    checkpoint.

    Arguments
    ---------
    tau : float
        Initial threshold.

    Example
    -------
    >>> gate = Gate(tau=2.0)
    >>> gate(torch.tensor([1.0, 2.0, 3.0]))
    tensor([ True,  True, False])
    """

    def __init__(self, tau: float) -> None:
        super().__init__()
        self.tau = nn.Buffer(torch.tensor(float(tau)))

    def extra_repr(self) -> str:
        """Returns the settings that repr shows."""
        return f"tau={float(self.tau):.4g}"

    def forward(self, losses: Tensor) -> Tensor:
        """Returns the mask (batch,) of losses (batch,); rejects a NaN."""
        return losses.detach() <= self.tau

    def start_iteration(self, iteration: int) -> None:
        """Does nothing; a subclass sets tau for the new pseudo-labels."""

    def end_epoch(self, epoch_losses: np.ndarray | Tensor) -> None:
        """Does nothing; a subclass sets tau from the epoch's losses (N,)."""


class NoGate(Gate):
    """A gate that selects everything: the baseline.

    Example
    -------
    >>> NoGate()(torch.tensor([1.0, 1e9]))
    tensor([True, True])
    """

    def __init__(self) -> None:
        super().__init__(math.inf)

    def forward(self, losses: Tensor) -> Tensor:
        """Returns a mask (batch,) that is True, for NaN losses too."""
        # Rejecting NaN would hide that a network has diverged.
        return torch.ones_like(losses, dtype=torch.bool)


class FixedGate(Gate):
    """A gate with one threshold for the whole training.

    A loss depends on the number of classes, the margin, the scale and the
    progress of the training. A threshold tuned on one corpus can therefore
    reject nearly all utterances of another.

    Arguments
    ---------
    tau : float
        Threshold on the loss, above 0.

    Example
    -------
    >>> FixedGate(tau=1.0)(torch.tensor([0.5, 1.5]))
    tensor([ True, False])
    """

    def __init__(self, tau: float) -> None:
        check_above0(tau=tau)
        super().__init__(tau)


class ScheduleGate(Gate):
    """A gate with one threshold per iteration; later iterations use the last.

    Arguments
    ---------
    taus : sequence of float
        Thresholds, at least one, each above 0; by default the paper's (section
        4).

    Example
    -------
    >>> gate = ScheduleGate(taus=[1, 3, 3, 5, 6])
    >>> gate.start_iteration(2)
    >>> gate.tau
    tensor(3.)
    """

    def __init__(self, taus: Sequence[float] = (1, 3, 3, 5, 6)) -> None:
        if not taus:
            raise ValueError("taus must hold at least one threshold, got none")
        for tau in taus:
            check_above0(taus=tau)
        super().__init__(taus[0])
        self.taus = [float(tau) for tau in taus]

    def extra_repr(self) -> str:
        """Returns the settings that repr shows."""
        return f"taus={self.taus}, {super().extra_repr()}"

    def start_iteration(self, iteration: int) -> None:
        """Sets tau to the threshold of the iteration, from 1."""
        _check_iteration(iteration)
        self.tau.fill_(self.taus[min(iteration, len(self.taus)) - 1])


class TargetShareGate(Gate):
    """A gate that selects a given share, which grows with the iterations.

    The paper tunes its thresholds by hand so that the selection grows by at
    least 10 % per iteration (section 4). This gate needs no tuning: tau is the
    quantile of the previous epoch's losses. In the first epoch of an iteration
    tau is NaN, and the gate uses the quantile of each batch. Losses fall during
    training, so the selected share is somewhat above the target.

    Arguments
    ---------
    share : float
        Share to select in iteration 1, in (0, 1].
    growth, ceiling : float
        Increase of the share at each further iteration, at least 0, and the
        highest share, in [share, 1]. A share of 1 selects all utterances.

    Example
    -------
    >>> gate = TargetShareGate(share=0.5)
    >>> gate(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    tensor([ True,  True, False, False])
    >>> gate.end_epoch(torch.arange(1.0, 11.0))
    >>> gate.tau
    tensor(5.)
    >>> gate.start_iteration(2)
    >>> gate.share
    0.6
    """

    def __init__(
        self, share: float = 0.5, growth: float = 0.1, ceiling: float = 1.0
    ) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share must be in (0, 1], got {share}")
        check_from(0, growth=growth)
        if not share <= ceiling <= 1:
            raise ValueError(
                f"ceiling must be in [share, 1] = [{share}, 1], got {ceiling}"
            )
        super().__init__(math.nan)
        self.first_share = share
        self.growth = growth
        self.ceiling = ceiling
        self.share = share

    def extra_repr(self) -> str:
        """Returns the settings that repr shows."""
        growth = f"growth={self.growth}, ceiling={self.ceiling}"
        return f"share={self.share:.4g}, {growth}, {super().extra_repr()}"

    def forward(self, losses: Tensor) -> Tensor:
        """Returns the mask (batch,) of losses (batch,); rejects a NaN."""
        losses = losses.detach()
        if self.share == 1 or not len(losses):
            return ~losses.isnan()
        # torch.where instead of `if`: reading tau on the host would stall the
        # GPU at every step.
        batch_tau = losses.nan_to_num(nan=math.inf, posinf=math.inf)
        batch_tau = batch_tau.kthvalue(_rank(self.share, len(losses))).values
        return losses <= torch.where(self.tau.isnan(), batch_tau, self.tau)

    def start_iteration(self, iteration: int) -> None:
        """Raises the share, and resets tau to NaN for the new pseudo-labels."""
        _check_iteration(iteration)
        grown = self.first_share + self.growth * (iteration - 1)
        self.share = min(self.ceiling, grown)
        self.tau.fill_(math.nan)

    def end_epoch(self, epoch_losses: np.ndarray | Tensor) -> None:
        """Sets tau to the quantile; keeps tau if no loss is finite."""
        losses = _finite(epoch_losses)
        if len(losses):
            index = _rank(self.share, len(losses)) - 1
            self.tau.fill_(float(np.partition(losses, index)[index]))


class DynamicGate(Gate):
    """A gate that sets tau between the two modes of the epoch's losses.

    Dynamic loss gate of DLG-LC (Han et al. 2022). The log losses of reliable
    and of unreliable labels form two modes. The gate fits two Gaussians to the
    log losses and sets tau to where the weighted densities meet between the
    means. If the densities do not meet, tau stays. The first epoch of an
    iteration selects everything, because a guessed tau could reject nearly all
    utterances. If `end_epoch` got the losses of an ungated epoch before, the
    first epoch is gated, too.

    Example
    -------
    >>> gate = DynamicGate()
    >>> gate.tau
    tensor(inf)
    >>> rng = np.random.default_rng(0)
    >>> logs = np.append(rng.normal(-2, 0.5, 700), rng.normal(2, 0.5, 300))
    >>> gate.end_epoch(np.exp(logs))
    >>> 0.5 < gate.tau < 2.0
    tensor(True)
    """

    def __init__(self) -> None:
        super().__init__(math.inf)

    def start_iteration(self, iteration: int) -> None:
        """Selects everything until the first epoch on the new labels ends."""
        _check_iteration(iteration)
        self.tau.fill_(math.inf)

    def end_epoch(self, epoch_losses: np.ndarray | Tensor) -> None:
        """Fits the mixture and moves tau to where its densities meet."""
        self._fit(_finite(epoch_losses))

    def _fit(self, losses):
        """Fits the mixture to finite losses; returns None if tau stays."""
        # A loss of 0.001 means that the label has a probability of 99.9 %. In
        # log scale lower losses, down to exact zeros, form a long tail. The
        # tail would take one of the two components for itself and put tau below
        # all other losses.
        logs = np.log(losses[losses > LOWEST])
        if len(logs) < 2:
            return None
        mixture = fit_mixture(logs)
        crossing = density_crossing(*mixture)
        if crossing is None:
            return None
        self.tau.fill_(math.exp(crossing))
        return mixture


class PosteriorGate(DynamicGate):
    """A gate that weights by the probability that the label is reliable.

    The weight, as in SSRL, is the posterior of the lower component of
    `DynamicGate`'s mixture, which is one half at tau. The gated loss is the
    weighted mean, sum(p * loss) / sum(p). A loss below the lower mean or above
    the upper one gets the weight of that mean, because further out the wider
    density would win on both sides. A loss that is not finite has weight 0.
    Before the first fit all other losses have weight 1.

    Example
    -------
    >>> gate = PosteriorGate()
    >>> rng = np.random.default_rng(0)
    >>> logs = np.append(rng.normal(-2, 0.5, 700), rng.normal(2, 0.5, 300))
    >>> gate.end_epoch(np.exp(logs))
    >>> low, middle, high = gate(
    ...     torch.stack([gate.tau / 9, gate.tau, gate.tau * 9])
    ... )
    >>> print(f"{low:.2f} {middle:.2f} {high:.2f}")
    1.00 0.50 0.00
    """

    def __init__(self) -> None:
        super().__init__()
        self.mixture = nn.Buffer(torch.ones(3, 2))

    def end_epoch(self, epoch_losses: np.ndarray | Tensor) -> None:
        """Fits the mixture; keeps the old one if the densities do not meet."""
        mixture = self._fit(_finite(epoch_losses))
        if mixture is not None:
            self.mixture.copy_(torch.from_numpy(np.stack(mixture)))

    def forward(self, losses: Tensor) -> Tensor:
        """Returns the weights (batch,), float32, of losses (batch,)."""
        losses = losses.detach().float()
        share, means, variances = self.mixture
        logs = losses.clamp(min=LOWEST).log().clamp(*means)[:, None]
        density = (share / variances.sqrt()).log()
        density = density - (logs - means).square() / (2 * variances)
        weights = density.softmax(1)[:, 0]
        weights = torch.where(self.tau.isinf(), 1.0, weights)
        return torch.where(losses.isfinite(), weights, 0.0)


class LabelCorrection(nn.Module):
    """Gives a new label to rejected utterances if the network is confident.

    Label correction of DLG-LC (Han et al. 2022): if the softmax of the clean
    crop exceeds `confidence`, the augmented crop is trained towards the
    predicted pseudo-speaker. The same pseudo-speaker must also be the
    prediction of more than half of the utterance's last epochs, because
    predictions change from step to step and a crop is not the whole utterance.

    A call takes rows (batch,), int64, cosines (batch, K) of clean crops,
    without margin, and the gate's mask (batch,). It returns new labels
    (batch,), int64, -1 for none. Call `end_epoch` after each epoch. The buffer
    `votes`, int32, has the predictions of each utterance, this epoch's first:
    -1 if the network was not confident, -2 if it made no prediction.

    Arguments
    ---------
    n_utterances : int
        Number of rows; a million take 20 MB.
    scale : float
        Factor of the cosines before the softmax, above 0: that of the training
        loss. A confidence of one half needs a cosine of about ln(K) / scale. At
        a scale of 30 that is 0.15 for 80 pseudo-speakers and 0.29 for 6,000.
    confidence : float
        Probability to exceed, in [0, 1).
    epochs : int
        Number of epochs that vote, at least 1. At 1, as in the paper, only the
        current crop counts.

    Example
    -------
    >>> correct = LabelCorrection(3, scale=30.0, confidence=0.5)
    >>> rows, selected = torch.arange(3), torch.tensor([True, False, False])
    >>> cosines = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
    >>> correct(rows, cosines, selected)
    tensor([-1,  1, -1])
    """

    def __init__(
        self,
        n_utterances: int,
        scale: float = 30.0,
        confidence: float = 0.5,
        epochs: int = 5,
    ) -> None:
        super().__init__()
        check_above0(scale=scale)
        check_share(confidence=confidence)
        check_from(1, epochs=epochs)
        self.scale = scale
        self.confidence = confidence
        votes = torch.full((n_utterances, epochs), -2, dtype=torch.int32)
        self.votes = nn.Buffer(votes)

    def extra_repr(self) -> str:
        """Returns the settings that repr shows."""
        shown = f"scale={self.scale}, confidence={self.confidence}"
        n_utterances, epochs = self.votes.shape
        return f"n_utterances={n_utterances}, {shown}, epochs={epochs}"

    def forward(
        self, rows: Tensor, cosines: Tensor, selected: Tensor
    ) -> Tensor:
        """Returns the new labels of a batch, -1 for selected utterances."""
        scaled = self.scale * cosines.float()
        probability, label = scaled.softmax(dim=1).max(dim=1)
        confident = probability > self.confidence
        self.votes[rows, 0] = torch.where(confident, label, -1).int()
        votes = self.votes[rows]
        counts = (votes[:, :, None] == votes[:, None]).sum(2)
        n_votes = (votes > -2).sum(1, keepdim=True)
        # At most one label has more than half of the votes.
        majority = torch.where(2 * counts > n_votes, votes, -1).amax(1)
        return torch.where(selected, -1, majority).long()

    def end_epoch(self, rows: np.ndarray, votes: np.ndarray) -> None:
        """Stores the votes (N,) of all processes, and begins the next epoch."""
        index = torch.from_numpy(rows).to(self.votes.device)
        self.votes[index, 0] = torch.from_numpy(votes).to(self.votes)
        self.votes.copy_(self.votes.roll(1, dims=1))
        self.votes[:, 0] = -2


def _finite(losses: np.ndarray | Tensor) -> np.ndarray:
    """Returns the finite losses as a float64 array."""
    if isinstance(losses, Tensor):
        losses = losses.detach().cpu().numpy()
    losses = np.asarray(losses, dtype=np.float64)
    return losses[np.isfinite(losses)]


def _rank(share: float, n: int) -> int:
    """Returns share * n, rounded up, and at least 1."""
    # In floats 0.1 + 0.1 * 2 is slightly above 0.3: without the factor, that
    # share of 10 utterances would be 4 instead of 3.
    return max(1, math.ceil(share * n * (1 - 1e-12)))


def _check_iteration(iteration: int) -> None:
    """Raises ValueError if an iteration is below 1."""
    if iteration < 1:
        raise ValueError(f"iterations count from 1, got {iteration}")
