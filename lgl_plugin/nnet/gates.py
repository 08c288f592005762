"""Which utterances count this step: gates over the loss per utterance.

A gate is called with a batch's losses and answers with a mask. Reliable
pseudo-labels are fitted faster, so a small loss speaks for the label (paper,
section 3). Gates differ in where their threshold tau comes from: nowhere, a
number, a number per iteration, the share to select, or the shape of the
epoch's losses. With several processes, hand every gate the epoch's losses of
all of them, so that all hold the same tau.
"""

import math

import numpy as np
import torch
from torch import nn


class Gate(nn.Module):
    """Selects the utterances whose loss is at most tau (paper, eq. 3).

    The base of all gates. `tau` is a buffer and so part of a checkpoint;
    when resuming, call `start_iteration` before the checkpoint is loaded.

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

    def __init__(self, tau):
        super().__init__()
        self.register_buffer("tau", torch.tensor(float(tau)))

    def forward(self, losses):
        """Selects from a batch.

        Arguments
        ---------
        losses : torch.Tensor
            Losses (batch,), float32. A NaN is never below a threshold.

        Returns
        -------
        torch.Tensor
            Mask (batch,), bool, True where the utterance counts.
        """
        return losses.detach() <= self.tau

    def start_iteration(self, iteration):
        """Called with new pseudo-labels, before training on them.

        Arguments
        ---------
        iteration : int
            Iteration of Stage II, from 1.
        """

    def end_epoch(self, epoch_losses):
        """Called after each training epoch.

        Arguments
        ---------
        epoch_losses : numpy.ndarray or torch.Tensor
            Losses (N,) of all the epoch's utterances, rejected ones too.
        """


class LossMemory(nn.Module):
    """A running mean of each utterance's loss, for a gate to look at.

    The loss of one step says as much about the augmentation that was drawn
    as about the label: a gate on it lets through what was augmented mildly,
    and the network forgets the rest. Averaged over epochs the augmentation
    cancels out and the label stays.

    Arguments
    ---------
    n_utterances : int
        How many utterances have a row.
    momentum : float
        Weight of the past, in [0, 1); 0 is the paper's gate, which sees the
        loss at hand.

    Raises
    ------
    ValueError
        If the momentum is out of range.

    Example
    -------
    >>> memory = LossMemory(3, momentum=0.5)
    >>> memory(torch.tensor([0, 2]), torch.tensor([4.0, 1.0]))
    tensor([4., 1.])
    >>> memory(torch.tensor([2, 1]), torch.tensor([3.0, 5.0]))
    tensor([2., 5.])
    """

    def __init__(self, n_utterances, momentum):
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        super().__init__()
        self.momentum = momentum
        self.register_buffer("losses", torch.full((n_utterances,), math.nan))

    def forward(self, rows, losses):
        """Takes in a batch and returns what is known of it now.

        Arguments
        ---------
        rows : torch.Tensor
            Which utterances, int64 (batch,).
        losses : torch.Tensor
            Their losses at this step, float32 (batch,).

        Returns
        -------
        torch.Tensor
            Their running means, float32 (batch,).
        """
        losses = losses.detach()
        past = self.losses[rows]
        mean = past + (1 - self.momentum) * (losses - past)
        mean = torch.where(past.isnan(), losses, mean)
        self.losses[rows] = mean
        return mean

    def take_in(self, rows, means):
        """Takes over running means, such as those of other processes.

        Arguments
        ---------
        rows : numpy.ndarray
            Which utterances, int64 (N,).
        means : numpy.ndarray
            Their running means, float32 (N,).

        Example
        -------
        >>> memory = LossMemory(3, momentum=0.5)
        >>> memory.take_in(np.array([2, 0]), np.array([1.0, 4.0], np.float32))
        >>> memory(torch.tensor([0, 1]), torch.tensor([2.0, 5.0]))
        tensor([3., 5.])
        """
        rows = torch.from_numpy(rows).to(self.losses.device)
        self.losses[rows] = torch.from_numpy(means).to(self.losses)


class NoGate(Gate):
    """Selects everything: the baseline without loss gate.

    Example
    -------
    >>> NoGate()(torch.tensor([1.0, 1e9]))
    tensor([True, True])
    """

    def __init__(self):
        super().__init__(math.inf)

    def forward(self, losses):
        """Selects all of a batch, NaN too: it hides nothing.

        Arguments
        ---------
        losses : torch.Tensor
            Losses (batch,), float32.

        Returns
        -------
        torch.Tensor
            Mask (batch,), bool, all True.
        """
        return torch.ones_like(losses, dtype=torch.bool)


class FixedGate(Gate):
    """One threshold for the whole training.

    A loss depends on K, margin, scale and how far training went: a
    threshold found on one corpus can reject nearly all of another.

    Arguments
    ---------
    tau : float
        Threshold on the loss, above 0.

    Raises
    ------
    ValueError
        If `tau` is not positive.

    Example
    -------
    >>> FixedGate(tau=1.0)(torch.tensor([0.5, 1.5]))
    tensor([ True, False])
    """

    def __init__(self, tau):
        super().__init__(_positive("tau", tau))


class ScheduleGate(Gate):
    """One threshold per iteration; the last one is kept beyond the end.

    Arguments
    ---------
    taus : list of float
        Thresholds, each above 0; the paper's (section 4) by default.

    Raises
    ------
    ValueError
        If `taus` is empty or holds a value that is not positive.

    Example
    -------
    >>> gate = ScheduleGate(taus=[1, 3, 3, 5, 6])
    >>> gate.start_iteration(2)
    >>> gate.tau
    tensor(3.)
    """

    def __init__(self, taus=(1, 3, 3, 5, 6)):
        if not taus:
            raise ValueError("taus must hold at least one threshold, got none")
        super().__init__(taus[0])
        self.taus = [_positive("taus", tau) for tau in taus]

    def start_iteration(self, iteration):
        """Takes the iteration's threshold.

        Arguments
        ---------
        iteration : int
            Iteration of Stage II, from 1.

        Raises
        ------
        ValueError
            If `iteration` is below 1.
        """
        _from_one(iteration)
        self.tau.fill_(self.taus[min(iteration, len(self.taus)) - 1])


class TargetShareGate(Gate):
    """Selects a given share, which grows with the iterations.

    tau is the quantile of the previous epoch's losses that yields the share;
    in an iteration's first epoch, with none seen, that of each batch itself,
    and tau reads NaN. As losses fall during training, the share that is in
    fact selected lies somewhat above the target. It finds by itself what the
    paper tuned by hand: thresholds with which the selection grows by at least
    10 % per iteration (section 4).

    Arguments
    ---------
    share : float
        Share to select in iteration 1, in (0, 1].
    growth : float
        Added to the share at each further iteration, at least 0. 0.1 is a
        growth of at least 10 %, as no share is above 1.
    ceiling : float
        The share never exceeds this, in [share, 1]. At 1, all is selected.

    Raises
    ------
    ValueError
        If an argument is out of its range.

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

    def __init__(self, share=0.5, growth=0.1, ceiling=1.0):
        if not 0 < share <= 1:
            raise ValueError(f"share must be in (0, 1], got {share}")
        if not growth >= 0:
            raise ValueError(f"growth must be at least 0, got {growth}")
        if not share <= ceiling <= 1:
            raise ValueError(
                f"ceiling must be in [share, 1] = [{share}, 1], got {ceiling}"
            )
        super().__init__(math.nan)
        self.first_share = share
        self.growth = growth
        self.ceiling = ceiling
        self.share = share

    def forward(self, losses):
        """Selects from a batch.

        Arguments
        ---------
        losses : torch.Tensor
            Losses (batch,), float32.

        Returns
        -------
        torch.Tensor
            Mask (batch,), bool, True where the utterance counts.
        """
        losses = losses.detach()
        if self.share == 1 or not len(losses):
            return ~losses.isnan()
        # No `if` on tau: reading it would stall a GPU at every step.
        own = losses.nan_to_num(nan=math.inf, posinf=math.inf)
        own = own.kthvalue(_count(self.share, len(losses))).values
        return losses <= torch.where(self.tau.isnan(), own, self.tau)

    def start_iteration(self, iteration):
        """Grows the share, and forgets the tau of the previous labels.

        Arguments
        ---------
        iteration : int
            Iteration of Stage II, from 1.

        Raises
        ------
        ValueError
            If `iteration` is below 1.
        """
        _from_one(iteration)
        grown = self.first_share + self.growth * (iteration - 1)
        self.share = min(self.ceiling, grown)
        self.tau.fill_(math.nan)

    def end_epoch(self, epoch_losses):
        """Sets tau to the quantile; without a finite loss it stays.

        Arguments
        ---------
        epoch_losses : numpy.ndarray or torch.Tensor
            Losses (N,) of all the epoch's utterances, rejected ones too.
        """
        losses = _finite(epoch_losses)
        if len(losses):
            rank = _count(self.share, len(losses)) - 1
            self.tau.fill_(float(np.partition(losses, rank)[rank]))


class DynamicGate(Gate):
    """Finds tau in the shape of the epoch's losses (Han et al. 2022).

    Log losses of reliable and unreliable labels form two humps: a mixture of
    two Gaussians is fitted to them, and tau lies where their weighted
    densities meet between the means. Where they do not meet, the previous
    tau is kept. An iteration's first epoch selects everything: the ungated
    training before it did too, while a guess could reject nearly all and
    starve the training. Handing over the losses of the last ungated epoch
    makes the gate select from the first step.

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

    def __init__(self):
        super().__init__(math.inf)

    def start_iteration(self, iteration):
        """Selects everything until an epoch on the new labels is seen.

        Arguments
        ---------
        iteration : int
            Iteration of Stage II, from 1.

        Raises
        ------
        ValueError
            If `iteration` is below 1.
        """
        _from_one(iteration)
        self.tau.fill_(math.inf)

    def end_epoch(self, epoch_losses):
        """Fits the mixture and moves tau to where its densities meet.

        Arguments
        ---------
        epoch_losses : numpy.ndarray or torch.Tensor
            Losses (N,) of all the epoch's utterances, rejected ones too.
        """
        # At 0.001 the label has a probability of 99.9 %: fitted by any
        # measure. Lower losses, down to exact zeros, are a tail in log scale
        # that would take a component for itself, with tau below all the rest.
        losses = _finite(epoch_losses)
        logs = np.log(losses[losses > 1e-3])
        if len(logs) < 2:
            return
        crossing = density_crossing(*fit_mixture(logs))
        if crossing is not None:
            self.tau.fill_(math.exp(crossing))


class LabelCorrection(nn.Module):
    """Gives what a gate rejects the label that the network is sure of.

    Label correction of DLG-LC (Han et al. 2022). The network predicts the
    pseudo-speaker of the clean crop; where its softmax exceeds `confidence`,
    the augmented crop is trained towards that one, with the margin on it, and
    counts in the divisor of the loss.

    Arguments
    ---------
    temperature : float
        Divides the cosines before the softmax, above 0. With K
        pseudo-speakers at a cosine of about 0, a confidence of one half needs
        a cosine of temperature * ln(K): 0.44 for 80 of them at 0.1, 0.87 for
        6,000.
    confidence : float
        Probability to exceed, in [0, 1).

    Raises
    ------
    ValueError
        If an argument is out of its range.

    Example
    -------
    >>> correct = LabelCorrection(temperature=0.1, confidence=0.5)
    >>> cosines = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
    >>> correct(cosines, selected=torch.tensor([True, False, False]))
    tensor([-1,  1, -1])
    """

    def __init__(self, temperature=0.1, confidence=0.5):
        super().__init__()
        self.temperature = _positive("temperature", temperature)
        if not 0 <= confidence < 1:
            raise ValueError(f"confidence must be in [0, 1), got {confidence}")
        self.confidence = confidence

    def forward(self, cosines, selected):
        """Corrects the labels of a batch.

        Arguments
        ---------
        cosines : torch.Tensor
            Cosines (batch, K) of the clean crops to the pseudo-speakers, no
            margin.
        selected : torch.Tensor
            What the gate lets through (batch,), bool; it keeps its labels.

        Returns
        -------
        torch.Tensor
            New labels (batch,), int64, -1 where there is none.
        """
        scaled = cosines.float() / self.temperature
        probability, label = scaled.softmax(dim=1).max(dim=1)
        sure = (probability > self.confidence) & ~selected
        return torch.where(sure, label, -1)


def fit_mixture(values, tolerance=1e-7, max_iterations=500):
    """Fits two Gaussians to numbers by expectation maximisation.

    Float64, deterministic: the means start at the quartiles. More than 65,536
    numbers are represented by as many evenly spaced order statistics, which
    moves the result by less than it depends on the epoch.

    Arguments
    ---------
    values : numpy.ndarray
        Finite numbers (N,), N at least 2.
    tolerance : float
        Stops when the mean log-likelihood grows by less.
    max_iterations : int
        Stops after as many steps.

    Returns
    -------
    weights, means, variances : numpy.ndarray
        Each (2,), float64, the component with the lower mean first.

    Example
    -------
    >>> weights, means, variances = fit_mixture(
    ...     np.array([0.0, 0.1, 0.2, 5.0, 5.1, 5.2])
    ... )
    >>> means.round(3).tolist()
    [0.1, 5.1]
    """
    x = np.sort(np.asarray(values, dtype=np.float64))
    if len(x) > 65536:
        x = x[np.linspace(0, len(x) - 1, 65536).round().astype(np.int64)]
    floor = 1e-6  # of a variance, as in scikit-learn
    weights = np.array([0.5, 0.5])
    means = np.quantile(x, [0.25, 0.75])
    variances = np.full(2, x.var() + floor)
    previous = -math.inf
    for _ in range(max_iterations):
        peaks = np.log(weights / np.sqrt(2 * math.pi * variances))
        squares = (x - means[:, None]) ** 2
        joint = peaks[:, None] - squares / (2 * variances[:, None])
        evidence = np.logaddexp(*joint)
        likelihood = evidence.mean()
        if likelihood - previous < tolerance:
            break
        previous = likelihood
        share = np.exp(joint - evidence)
        # A component that has lost all its points stays finite.
        total = share.sum(axis=1) + 10 * np.finfo(np.float64).eps
        weights = total / total.sum()
        means = share @ x / total
        spread = (share * (x - means[:, None]) ** 2).sum(axis=1)
        variances = spread / total + floor
    order = np.argsort(means, kind="stable")
    return weights[order], means[order], variances[order]


def density_crossing(weights, means, variances):
    """Where two weighted Gaussian densities meet between their means.

    Arguments
    ---------
    weights, means, variances : array-like
        Each of two numbers; the lower mean first.

    Returns
    -------
    float or None
        None when one density is above the other at both means.

    Example
    -------
    >>> density_crossing([0.5, 0.5], [0.0, 4.0], [1.0, 1.0])
    2.0
    >>> density_crossing([0.99, 0.01], [0.0, 1.0], [1.0, 1.0]) is None
    True
    """
    # The log of the ratio of the densities, t to the right of the lower mean,
    # is a t^2 + b t + c. Its slope is negative at both means, hence between
    # them: one root at most, and there is one if and only if the sign changes.
    # The root with negative slope, in the form that does not divide by a.
    (v1, v2), gap = variances, means[1] - means[0]
    log_ratio = math.log(weights[0] / weights[1]) - math.log(v1 / v2) / 2
    a = 1 / (2 * v2) - 1 / (2 * v1)
    b = -gap / v2
    c = log_ratio + gap**2 / (2 * v2)
    at_upper_mean = log_ratio - gap**2 / (2 * v1)
    if not (c > 0 > at_upper_mean):
        return None
    return float(means[0] + 2 * c / (math.sqrt(b * b - 4 * a * c) - b))


def _finite(losses):
    """The finite ones of an array's or a tensor's losses, as float64."""
    if isinstance(losses, torch.Tensor):
        losses = losses.detach().cpu().numpy()
    losses = np.asarray(losses, dtype=np.float64)
    return losses[np.isfinite(losses)]


def _count(share, n):
    """How many of n make up the share: at least one, rounded up."""
    # 0.1 + 0.1 * 2 is a little above 0.3, and must not count as one more.
    return max(1, math.ceil(share * n * (1 - 1e-12)))


def _positive(name, value):
    if not value > 0:
        raise ValueError(f"{name} must be above 0, got {value}")
    return float(value)


def _from_one(iteration):
    if iteration < 1:
        raise ValueError(f"iterations count from 1, got {iteration}")
