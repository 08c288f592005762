"""Loss gates: masks over a batch of the utterances whose label is trusted.

A network fits reliable pseudo-labels faster, so a small loss speaks for the
label (paper, section 3). Gates differ in the source of their threshold tau.
With several processes, give every gate the epoch's losses of all of them, so
that all hold the same tau. An argument out of its range is a ValueError.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lgl_plugin.nnet.mixture import density_crossing, fit_mixture
from lgl_plugin.utils.checks import check_above0, check_from, check_share

LOWEST = 1e-3  # loss that enters a mixture


class Gate(nn.Module):
    """A gate that selects the utterances whose loss is at most tau.

    The base of all gates (paper, eq. 3) maps losses (batch,), float32, to a
    mask (batch,), bool, or to weights in [0, 1], float32, of which those above
    one half count as selected. Call `start_iteration` (from 1) before training
    on new pseudo-labels, and `end_epoch` after each epoch with the losses (N,)
    of all its utterances, rejected ones too. The buffer `tau` is part of a
    checkpoint; when resuming, call `start_iteration` before it is loaded.

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
        # Were NaN rejected, a diverged network would train on and look well.
        return torch.ones_like(losses, dtype=torch.bool)


class FixedGate(Gate):
    """A gate with one threshold for the whole training.

    A loss depends on the number of classes, margin, scale and progress: a
    threshold found on one corpus can reject nearly all of another.

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
    """A gate with one threshold per iteration; the last one stays.

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

    It replaces thresholds tuned by hand so that the selection grows by at least
    10 % per iteration (paper, section 4). tau is the quantile of the previous
    epoch's losses; in the first epoch of an iteration tau is NaN, and the gate
    takes the quantile of each batch. As losses fall during training, the
    selected share lies somewhat above the target.

    Arguments
    ---------
    share : float
        Share to select in iteration 1, in (0, 1].
    growth, ceiling : float
        Increase of the share at each further iteration, at least 0, and the
        highest share, in [share, 1]. At 1, all is selected.

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
        # torch.where and not `if`: reading tau on the host would stall the GPU
        # at every step.
        own = losses.nan_to_num(nan=math.inf, posinf=math.inf)
        own = own.kthvalue(_rank(self.share, len(losses))).values
        return losses <= torch.where(self.tau.isnan(), own, self.tau)

    def start_iteration(self, iteration: int) -> None:
        """Grows the share, and forgets the tau of the previous labels."""
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
    """A gate that finds tau in the shape of the epoch's losses.

    Dynamic loss gate of DLG-LC (Han et al. 2022). The log losses of reliable
    and unreliable labels form two humps: two Gaussians are fitted to them, and
    tau lies where their weighted densities meet between the means. If they do
    not meet, tau stays. The first epoch of an iteration selects everything,
    unless `end_epoch` got the losses of an ungated epoch before: a guess could
    reject nearly all and starve the training.

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
        self._adopt(_finite(epoch_losses))

    def _adopt(self, losses):
        """Fits the mixture to finite losses, and returns it if tau moved."""
        # A loss of 0.001 gives the label a probability of 99.9 %: fitted by
        # any measure. Lower losses, down to exact zeros, are a tail in log
        # scale that would take one of the two components for itself and put
        # tau below all other losses.
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

    That of SSRL: the posterior of the lower hump of
    `DynamicGate`'s mixture, which is one half at tau. The gated loss is the
    weighted mean, sum(p * loss) / sum(p). Below the lower mean and above the
    upper one the weight is that at the mean: further out the wider density
    would win on both sides. A loss that is not finite has no weight; before the
    first fit all others have weight 1.

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
        """Fits the mixture, unless its densities do not meet."""
        mixture = self._adopt(_finite(epoch_losses))
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
    """A second label for rejected utterances of which the network is sure.

    Label correction of DLG-LC (Han et al. 2022): where the softmax of the clean
    crop exceeds `confidence`, the augmented crop is trained towards the
    predicted pseudo-speaker. That prediction must be the one of more than half
    of the utterance's last epochs: a network changes its mind from step to
    step, and a crop is not the whole utterance.

    A call with rows (batch,), int64, cosines (batch, K) of clean crops, without
    margin, and the gate's mask (batch,) returns new labels (batch,), int64, -1
    for none. Call `end_epoch` after each epoch. The buffer `votes`, int32,
    holds the predictions of each utterance, this epoch's first; -1 where the
    network was not sure, -2 where it was not asked.

    Arguments
    ---------
    n_utterances : int
        Number of rows; a million take 20 MB.
    scale : float
        Factor of the cosines before the softmax, above 0: that of the training
        loss. A confidence of one half needs a cosine of about ln(K) / scale: at
        30, 0.15 for 80 pseudo-speakers and 0.29 for 6,000.
    confidence : float
        Probability to exceed, in [0, 1).
    epochs : int
        How many vote, at least 1; at 1, as in the paper, the crop at hand.

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
        """Returns the new labels of a batch; what is selected gets none."""
        scaled = self.scale * cosines.float()
        probability, label = scaled.softmax(dim=1).max(dim=1)
        sure = probability > self.confidence
        self.votes[rows, 0] = torch.where(sure, label, -1).int()
        votes = self.votes[rows]
        alike = (votes[:, :, None] == votes[:, None]).sum(2)
        asked = (votes > -2).sum(1, keepdim=True)
        # One label at most has more than half of the votes.
        elected = torch.where(2 * alike > asked, votes, -1).amax(1)
        return torch.where(selected, -1, elected).long()

    def end_epoch(self, rows: np.ndarray, votes: np.ndarray) -> None:
        """Takes the votes (N,) of all ranks, and begins the next epoch."""
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
    """Returns the number of n that make up the share, rounded up, from 1."""
    # In floats 0.1 + 0.1 * 2 is a little above 0.3: without the factor the
    # share of 10 utterances would round up to 4 and not 3.
    return max(1, math.ceil(share * n * (1 - 1e-12)))


def _check_iteration(iteration: int) -> None:
    """Raises ValueError if an iteration is below 1."""
    if iteration < 1:
        raise ValueError(f"iterations count from 1, got {iteration}")
