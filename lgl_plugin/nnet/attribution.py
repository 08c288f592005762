"""Integrated gradients: the parts of an input that a score comes from.

Sundararajan et al., "Axiomatic Attribution for Deep Networks", ICML 2017. The
gradient is averaged over a straight path from a baseline, which lacks what is
to be explained, to the input. Times the difference of both, it is what each
value of the input adds; these parts sum to the difference of the scores.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

FIRST_STEPS = 32
# A score that hardly changes is judged as if it changed by this much: rounding
# alone could be 5 % of nothing.
LEAST_CHANGE = 0.1
# Hz by which a band may seem to lie below the one before: two narrow ones can
# share a bin of the spectrum.
ROUGH = 50.0


@dataclass
class Attribution:
    """The mean gradient of a path, and what it started and ended at.

    `gradient` and `difference`, of input and baseline, have the input's shape.
    """

    gradient: Tensor
    difference: Tensor
    score: float
    baseline_score: float
    steps: int

    @property
    def values(self) -> Tensor:
        """Returns, for each value of the input, its part of the change."""
        return self.gradient * self.difference

    @property
    def error(self) -> float:
        """How far the sum of all values is from the change, as its share."""
        change = self.score - self.baseline_score
        missed = abs(float(self.values.double().sum()) - change)
        return missed / max(abs(change), LEAST_CHANGE)


def integrated_gradients(
    function: Callable[[Tensor], Tensor],
    inputs: Tensor,
    baseline: Tensor,
    steps: int = 512,
    limit: float = 0.05,
    batch_size: int = 16,
) -> Attribution:
    """Attributes a score to its input, by as many steps as that takes.

    `function` takes inputs (n, ...), each on its own, `batch_size` at once, and
    returns scores (n,); `inputs` and `baseline` have one shape (...). The path
    is integrated by Gauss and Legendre's nodes, 32 at first, twice as many
    while `error` is above `limit`. ValueError if `steps` do not suffice, or the
    score has no gradient.
    """
    with torch.no_grad():
        ends = function(torch.stack([baseline, inputs])).double().tolist()
    number = min(FIRST_STEPS, steps)
    while True:
        mean = _mean_gradient(function, inputs, baseline, number, batch_size)
        found = Attribution(mean, inputs - baseline, ends[1], ends[0], number)
        if found.error <= limit:
            return found
        if 2 * number > steps:
            raise ValueError(
                f"with {number} steps the attributions miss "
                f"{found.error:.0%} of the score's change, and {limit:.0%} "
                f"may be missed: give more steps, such as {4 * number}"
            )
        number *= 2


def _mean_gradient(function, inputs, baseline, steps, batch_size):
    """Returns the mean of the gradient over the path, of the input's shape."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    shape = (-1, *[1] * inputs.ndim)
    places = inputs.new_tensor((nodes + 1) / 2).reshape(shape)
    weights = inputs.new_tensor(weights / 2).reshape(shape)
    mean = torch.zeros_like(inputs)
    for place, weight in zip(
        places.split(batch_size), weights.split(batch_size)
    ):
        point = baseline + place * (inputs - baseline)
        scores = function(point.requires_grad_())
        if not scores.requires_grad:
            raise ValueError(
                "the score has no gradient with respect to this input: a part "
                "of the encoder works under torch.no_grad"
            )
        (gradient,) = torch.autograd.grad(scores.sum(), point)
        mean += (weight * gradient).sum(0)
    return mean


def shaped_noise(waveform: Tensor, seed: int) -> Tensor:
    """Returns noise of a waveform's long-term spectrum: its phases drawn anew.

    The baseline of a waveform: the spectrum of the whole stays, and nothing
    that happens in time. (Silence would not do for features that lose their
    mean: they are alike at all levels but the very lowest.)
    """
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.fft.rfft(waveform)
    phases = torch.rand(spectrum.shape, generator=generator)
    turned = spectrum * torch.exp(2j * np.pi * phases).to(spectrum)
    turned[0] = spectrum[0]
    return torch.fft.irfft(turned, n=len(waveform))


def by_frequency(gradient: Tensor, difference: Tensor, window: int) -> Tensor:
    """Splits a waveform's attribution by time and frequency, exactly.

    A sum of products over samples is one over the bins of a Fourier transform,
    frame by frame, and the frames' windows add to one: all that is returned
    sums to what all samples have.

    Arguments
    ---------
    gradient, difference : torch.Tensor
        As an `Attribution` of a waveform has them, (samples,).
    window : int
        Samples of a frame, even; the next is half as many on.

    Returns
    -------
    torch.Tensor
        Shape (frames, window // 2 + 1).

    Example
    -------
    >>> gradient, difference = torch.randn(2, 1000, dtype=torch.float64)
    >>> parts = by_frequency(gradient, difference, 64)
    >>> torch.allclose(parts.sum(), gradient @ difference)
    True
    """
    hop = window // 2
    taper = torch.hann_window(window).to(gradient).sqrt()
    behind = hop + (-len(gradient)) % hop
    spectra = [
        torch.fft.rfft(pad(x, (hop, behind)).unfold(0, window, hop) * taper)
        for x in (gradient, difference)
    ]
    parts = (spectra[0].conj() * spectra[1]).real * 2 / window
    parts[:, [0, -1]] /= 2  # these two stand for one frequency, not for two
    return parts


@torch.no_grad()
def band_centres(
    features: torch.nn.Module, sample_rate: int
) -> np.ndarray | None:
    """Finds the frequency, in Hz, at which each band of features is highest.

    By tones, 10 Hz apart. None of a front end that has weights, or no bands
    that rise, such as one of cepstra.
    """
    if any(True for _ in features.parameters()):
        return None
    hz = torch.arange(10.0, sample_rate / 2, 10.0)
    time = torch.arange(sample_rate // 10) / sample_rate
    answers = features(torch.sin(2 * np.pi * hz[:, None] * time))
    if answers.ndim != 3 or answers.shape[2] < 2:
        return None
    levels = answers.mean(1)
    centres = hz[levels.argmax(0)].numpy()
    # A band too narrow for any bin of the spectrum lies as far below the
    # loudest band whatever the tone.
    levels = levels - levels.amax(1, keepdim=True)
    known = (levels.amax(0) - levels.amin(0) > 1e-3).numpy()
    if not known.any():
        return None
    places = np.arange(len(centres))
    centres = np.interp(places, places[known], centres[known])
    rising = np.diff(centres).min() > -ROUGH and centres[0] < centres[-1]
    return np.maximum.accumulate(centres) if rising else None


@dataclass
class Layers:
    """A part of a network that takes the outputs of several layers at once.

    They are `number` equal shares of the channels, (batch, channels, frames);
    or, if that is 0, stacked before the batch, (layers, batch, ...).
    """

    part: torch.nn.Module
    number: int

    def outputs(self, run: Callable[[], Tensor]) -> Tensor:
        """Returns what the part gets in a run, the batch first."""
        found = []
        hook = self.part.register_forward_pre_hook(
            lambda _, args: found.append(args[0])
        )
        try:
            run()
        finally:
            hook.remove()
        return found[0] if self.number else found[0].transpose(0, 1)

    @contextlib.contextmanager
    def given(self, value: Tensor) -> Iterator[None]:
        """Gives the part other outputs, the batch first."""
        value = value if self.number else value.transpose(0, 1)
        hook = self.part.register_forward_pre_hook(
            lambda _, args: (value.to(args[0]), *args[1:])
        )
        try:
            yield
        finally:
            hook.remove()

    def sums(self, values: Tensor) -> list[float]:
        """Sums values, of an input without the batch, by layer."""
        parts = values.chunk(self.number) if self.number else values
        return [float(part.sum()) for part in parts]


def layers_of(network: torch.nn.Module) -> Layers | None:
    """Finds the part that takes the outputs of several layers, if any.

    `mfa` of SpeechBrain's ECAPA-TDNN gets those of its blocks, the `head` of
    a pre-trained speech model the `states` of all.
    """
    for part in network.modules():
        head, mfa = getattr(part, "head", None), getattr(part, "mfa", None)
        if isinstance(head, torch.nn.Module) and hasattr(part, "states"):
            return Layers(head, 0)
        if isinstance(mfa, torch.nn.Module) and hasattr(part, "blocks"):
            return Layers(mfa, len([*part.blocks.children()]) - 1)  # type: ignore[union-attr]
    return None
