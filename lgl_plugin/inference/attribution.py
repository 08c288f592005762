"""Attributes a verification score to frequency, time and layers.

Works for any encoder.
"""

import copy
import functools
from dataclasses import dataclass

import numpy as np
import torch

from lgl_plugin.nnet.attribution import (
    Attribution,
    band_centres,
    by_frequency,
    integrated_gradients,
    layers_of,
    shaped_noise,
)
from lgl_plugin.nnet.ecapa_patches import lean_pooling

SECONDS = 24.0  # seconds of speech in a batch of steps
WINDOW = 0.032  # length of a frame in a waveform's map, in seconds
BANDS = 24  # bands of a waveform's map, equally wide in mel
PATHS = ("features", "waveform", "layers")


@dataclass
class Map:
    """A score's change by time and frequency.

    `values` are the changes, and `levels` the features or a log spectrum, both
    float32 (frames, bands). `hz` are the centres of the bands, `hop` the
    seconds between frames.
    """

    values: np.ndarray
    levels: np.ndarray
    hz: np.ndarray
    hop: float


@dataclass
class Explanation:
    """The attributions of a score, as maps and by layer.

    `paths` are all attributions, by the kind of path. `maps` ("features",
    "waveform") and `layers`, float (n,), are sums of them; they are empty if
    there is no such path.
    """

    paths: dict[str, Attribution]
    maps: dict[str, Map]
    layers: np.ndarray

    @property
    def score(self) -> float:
        """The cosine of both recordings."""
        return next(iter(self.paths.values())).score


class Explainer:
    """Attributes the cosine of two recordings to parts of the second.

    - Over the features, if the encoder's front end has bands. The baseline is
      their mean over time, the same in all frames.
    - Over the waveform, for any encoder. The baseline is noise with the
      recording's long-term spectrum.
    - Over the layers that the network joins, such as the blocks of ECAPA-TDNN.
      The baseline is their output for the first of the two baselines above
      that the encoder has.

    Arguments
    ---------
    encoder : torch.nn.Module
        As `Extractor` takes it. It is put into eval mode, and its weights are
        frozen.
    sample_rate : int
        In Hz.
    steps : int
        The most steps of a path, see `integrated_gradients`.
    seed : int
        The seed of the noise.
    over : tuple of str
        The paths, of "features", "waveform" and "layers". A path that the
        encoder does not have is left out.

    Raises
    ------
    ValueError
        If none is left.

    Example
    -------
    >>> from speechbrain.lobes.features import Fbank
    >>> from lgl_plugin.nnet.encoders import Encoder, LogMelStatistics
    >>> explain = Explainer(Encoder(Fbank(n_mels=20), LogMelStatistics()))
    >>> one, other = torch.randn(2, 8000)
    >>> found = explain(one, other)
    >>> {name: part.values.shape for name, part in found.maps.items()}
    {'features': (51, 20), 'waveform': (33, 24)}
    """

    def __init__(
        self,
        encoder: torch.nn.Module,
        sample_rate: int = 16000,
        steps: int = 512,
        seed: int = 0,
        over: tuple[str, ...] = PATHS,
    ):
        self.encoder = encoder.eval().requires_grad_(False)
        for part in encoder.modules():
            # With `freeze`, SpeechBrain's wrappers of pre-trained models run
            # under torch.no_grad, which blocks the gradient. Its filterbank has
            # no weights, and uses `freeze` for something else.
            weights = any(True for _ in part.parameters())
            if weights and getattr(part, "freeze", False) is True:
                part.freeze = False  # type: ignore[assignment]
        self.sample_rate = sample_rate
        self.steps = steps
        self.seed = seed
        features = getattr(encoder, "features", None)
        self.hz = None
        if features is not None:
            on_cpu = copy.deepcopy(features).cpu()
            self.hz = band_centres(on_cpu, sample_rate)
        self.layers = layers_of(encoder)
        has = {"waveform": True, "features": self.hz is not None}
        has["layers"] = self.layers is not None
        self.over = [name for name in PATHS if name in over and has[name]]
        if not self.over:
            raise ValueError(
                f"this encoder has no {' or '.join(over)} to attribute a score "
                f"to; it has {', '.join(n for n in PATHS if has[n])}"
            )

    def __call__(
        self, reference: torch.Tensor, waveform: torch.Tensor
    ) -> Explanation:
        """Attributes the cosine of two waveforms (samples,) to the second.

        Raises ValueError if the steps do not suffice on one of the paths.
        """
        wav = waveform[None]
        with torch.no_grad():
            reference = self.encoder(reference[None])
        score = functools.partial(torch.cosine_similarity, reference)
        size = max(1, int(SECONDS * self.sample_rate / len(waveform)))
        options = {"steps": self.steps, "batch_size": size}
        noise = shaped_noise(waveform.cpu(), self.seed).to(waveform)
        paths = {}
        embed, start, end = self.encoder, noise[None], wav
        levels = None
        if self.hz is not None:
            embed = self._embed_features
            with torch.no_grad():
                features = self.encoder.features(wav)  # type: ignore[operator]
                levels = features[0]
                end = self.encoder.normalised(features)  # type: ignore[operator]
            start = end.mean(1, keepdim=True).expand_as(end)
        if "features" in self.over:
            paths["features"] = integrated_gradients(
                lambda x: score(embed(x)), end[0], start[0], **options
            )
        if "waveform" in self.over:
            paths["waveform"] = integrated_gradients(
                lambda x: score(self.encoder(x)), waveform, noise, **options
            )
        if "layers" in self.over:
            paths["layers"] = self._over_layers(
                score, embed, start, end, options
            )
        return self._views(paths, waveform, levels)

    def _embed_features(self, features):
        """Embeds normalised features (n, frames, bands)."""
        network = self.encoder.network
        with lean_pooling(network):
            return network(features).flatten(1).float()

    def _over_layers(self, score, embed, start, end, options):
        """Attributes the score to the layers' outputs."""
        with torch.no_grad():
            ends = [
                self.layers.outputs(functools.partial(embed, x))[0]
                for x in (start, end)
            ]

        def score_of(hidden):
            with self.layers.given(hidden):
                return score(embed(end.expand(len(hidden), *end.shape[1:])))

        return integrated_gradients(score_of, ends[1], ends[0], **options)

    def _views(self, paths, waveform, levels):
        """Sums attributions to maps and layers."""
        maps, layers = {}, np.zeros(0)
        if "features" in paths:
            values = paths["features"].values.cpu().numpy()
            hop = self.encoder.hop / self.sample_rate
            maps["features"] = Map(values, levels.cpu().numpy(), self.hz, hop)
        if "waveform" in paths:
            maps["waveform"] = self._waveform_map(paths["waveform"], waveform)
        if "layers" in paths:
            layers = np.array(self.layers.sums(paths["layers"].values))
        return Explanation(paths, maps, layers)

    def _waveform_map(self, path, waveform):
        """Sums a waveform's attribution by frames and bands."""
        window = 2 * int(self.sample_rate * WINDOW / 2)
        parts = by_frequency(path.gradient, path.difference, window)
        power = by_frequency(waveform, waveform, window)
        hz, bands = mel_bands(window // 2 + 1, self.sample_rate)
        levels = 10 * (power.cpu() @ bands).clamp(min=1e-10).log10()
        values = (parts.cpu() @ bands).numpy()
        hop = window / 2 / self.sample_rate
        return Map(values, levels.numpy(), hz, hop)


def mel_bands(n_bins: int, sample_rate: int) -> tuple[np.ndarray, torch.Tensor]:
    """Sorts the bins of a spectrum into bands, each bin into one.

    Returns the bands' centres in Hz, and a matrix of 0 and 1, (bins, bands).
    """
    hz = np.linspace(0, sample_rate / 2, n_bins)
    mel = 2595 * np.log10(1 + hz / 700)
    band = np.minimum(mel / mel[-1] * BANDS, BANDS - 1).astype(int)
    middle = (np.arange(BANDS) + 0.5) / BANDS * mel[-1]
    centres = 700 * (10 ** (middle / 2595) - 1)
    return centres, torch.eye(BANDS)[band]
