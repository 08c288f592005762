"""Integrated gradients: how much each value of an input adds to a score.

Sundararajan et al., "Axiomatic Attribution for Deep Networks", ICML 2017. The
gradient is averaged over a straight path from a baseline, which lacks what is
to be explained, to the input. The mean gradient times the difference of input
and baseline is the attribution of each value. All attributions sum to the
difference of the two scores.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

FIRST_STEPS = 32
# Smallest change of a score that `error` divides by: of a change near 0
# rounding alone could be 5 %.
LEAST_CHANGE = 0.1
# A band's measured centre may be this many Hz below that of the band before:
# two narrow bands can share a bin of the spectrum.
ROUGH = 50.0


@dataclass
class Attribution:
    """The mean gradient over a path, and the scores at both ends.

    `gradient` and `difference`, of input and baseline, have the input's shape.
    """

    gradient: Tensor
    difference: Tensor
    score: float
    baseline_score: float
    steps: int

    @property
    def values(self) -> Tensor:
        """Returns the attribution of each value of the input."""
        return self.gradient * self.difference

    @property
    def error(self) -> float:
        """Returns the error of the sum of values, as a share of the change."""
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
    """Attributes a score to its input, with as many steps as needed.

    `function` takes at most `batch_size` independent inputs (n, ...) at once,
    and returns scores (n,). `inputs` and `baseline` have one shape (...). The
    path is integrated by Gauss-Legendre quadrature with 32 nodes at first, and
    twice as many while `error` is above `limit`. Raises ValueError if `steps`
    nodes do not suffice, or the score has no gradient.
    """
    with torch.no_grad():
        ends = function(torch.stack([baseline, inputs])).double().tolist()
    number = min(FIRST_STEPS, steps)
    while True:
        mean = _mean_gradient(function, inputs, baseline, number, batch_size)
        result = Attribution(mean, inputs - baseline, ends[1], ends[0], number)
        if result.error <= limit:
            return result
        if 2 * number > steps:
            raise ValueError(
                f"with {number} steps the attributions miss "
                f"{result.error:.0%} of the score's change, and {limit:.0%} "
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
    """Returns noise with a waveform's long-term spectrum and random phases.

    The noise is the baseline of a waveform: it has the same long-term spectrum
    and none of the events in time. Silence would be no baseline for features
    whose mean is subtracted: such features are the same at all but the very
    lowest levels.
    """
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.fft.rfft(waveform)
    phases = torch.rand(spectrum.shape, generator=generator)
    randomised = spectrum * torch.exp(2j * np.pi * phases).to(spectrum)
    randomised[0] = spectrum[0]
    return torch.fft.irfft(randomised, n=len(waveform))


def by_frequency(gradient: Tensor, difference: Tensor, window: int) -> Tensor:
    """Splits a waveform's attribution by time and frequency, exactly.

    In each frame a sum of products over samples equals one over Fourier bins
    (Parseval), and the squared windows of all frames sum to one. So the result
    sums to the attribution of all samples.

    Arguments
    ---------
    gradient, difference : torch.Tensor
        Those of a waveform's `Attribution`, (samples,).
    window : int
        Samples of a frame, even; the hop is half of that.

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
    right = hop + (-len(gradient)) % hop
    spectra = [
        torch.fft.rfft(pad(x, (hop, right)).unfold(0, window, hop) * taper)
        for x in (gradient, difference)
    ]
    parts = (spectra[0].conj() * spectra[1]).real * 2 / window
    parts[:, [0, -1]] /= 2  # 0 Hz and Nyquist have no mirrored bin
    return parts


@torch.no_grad()
def band_centres(
    features: torch.nn.Module, sample_rate: int
) -> np.ndarray | None:
    """Measures the centre frequency, in Hz, of each band of features.

    The probes are tones, 10 Hz apart. Returns None for a front end that has
    weights, or whose bands do not ascend in frequency, such as cepstra.
    """
    if any(True for _ in features.parameters()):
        return None
    hz = torch.arange(10.0, sample_rate / 2, 10.0)
    time = torch.arange(sample_rate // 10) / sample_rate
    responses = features(torch.sin(2 * np.pi * hz[:, None] * time))
    if responses.ndim != 3 or responses.shape[2] < 2:
        return None
    levels = responses.mean(1)
    centres = hz[levels.argmax(0)].numpy()
    # A band too narrow for any bin of the spectrum has no peak: it is equally
    # far below the loudest band at every tone.
    levels = levels - levels.amax(1, keepdim=True)
    has_peak = (levels.amax(0) - levels.amin(0) > 1e-3).numpy()
    if not has_peak.any():
        return None
    places = np.arange(len(centres))
    centres = np.interp(places, places[has_peak], centres[has_peak])
    rising = np.diff(centres).min() > -ROUGH and centres[0] < centres[-1]
    return np.maximum.accumulate(centres) if rising else None


@dataclass
class Layers:
    """A part of a network that takes the outputs of several layers at once.

    If `number` is above 0, these are equal shares of the channels, (batch,
    channels, frames). If `number` is 0, they are stacked, (layers, batch, ...).
    """

    part: torch.nn.Module
    number: int

    def outputs(self, run: Callable[[], Tensor]) -> Tensor:
        """Returns the part's input in a run, the batch axis first."""
        inputs = []
        hook = self.part.register_forward_pre_hook(
            lambda _, args: inputs.append(args[0])
        )
        try:
            run()
        finally:
            hook.remove()
        return inputs[0] if self.number else inputs[0].transpose(0, 1)

    @contextlib.contextmanager
    def given(self, value: Tensor) -> Iterator[None]:
        """Replaces the part's input by a value, the batch axis first."""
        value = value if self.number else value.transpose(0, 1)
        hook = self.part.register_forward_pre_hook(
            lambda _, args: (value.to(args[0]), *args[1:])
        )
        try:
            yield
        finally:
            hook.remove()

    def sums(self, values: Tensor) -> list[float]:
        """Sums the values of one input, without batch axis, by layer."""
        parts = values.chunk(self.number) if self.number else values
        return [float(part.sum()) for part in parts]


def layers_of(network: torch.nn.Module) -> Layers | None:
    """Finds the part that takes the outputs of several layers, if any.

    In SpeechBrain's ECAPA-TDNN this is `mfa`, which takes the outputs of the
    blocks. In a pre-trained speech model this is the `head`, which takes the
    `states` of all layers.
    """
    for part in network.modules():
        head, mfa = getattr(part, "head", None), getattr(part, "mfa", None)
        if isinstance(head, torch.nn.Module) and hasattr(part, "states"):
            return Layers(head, 0)
        if isinstance(mfa, torch.nn.Module) and hasattr(part, "blocks"):
            return Layers(mfa, len([*part.blocks.children()]) - 1)  # type: ignore[union-attr]
    return None
