"""Explanations of encoders with bands, with a waveform alone, with a freeze."""

import functools

import numpy as np
import pytest
import torch
from speechbrain.lobes.features import Fbank
from speechbrain.processing.features import InputNormalization
from tiny_brains import tiny_encoder
from tiny_speech import config

from lgl_plugin.inference.attribution import Explainer, mel_bands
from lgl_plugin.nnet.encoders import Encoder, LogMelStatistics
from lgl_plugin.nnet.features import Waveform
from lgl_plugin.nnet.speech_heads import MHFA
from lgl_plugin.nnet.speech_model import SpeechModel


class Frozen(torch.nn.Module):
    """As SpeechBrain's wrappers of pre-trained models: no gradient at all."""

    def __init__(self):
        super().__init__()
        self.layer, self.freeze = torch.nn.Linear(20, 6), True

    def forward(self, wavs, lengths=None):
        with torch.set_grad_enabled(not self.freeze):
            frames = wavs[:, : wavs.shape[1] // 20 * 20].unflatten(1, (-1, 20))
            return self.layer(frames).tanh().square().mean(1)


def cosine(encoder, *wavs):
    with torch.no_grad():
        one, other = (encoder(wav[None]) for wav in wavs)
    return float(torch.cosine_similarity(one, other))


def check(found, encoder, wavs):
    """Maps sum to the change of the score that the encoder gives."""
    assert found.score == pytest.approx(cosine(encoder, *wavs), abs=1e-5)
    for name, part in found.maps.items():
        path = found.paths[name]
        assert path.error <= 0.05
        total = float(path.values.double().sum())
        assert part.values.sum() == pytest.approx(total, abs=1e-4)
        assert part.values.shape == part.levels.shape
        assert part.values.shape[1] == len(part.hz)


def test_bands_that_an_encoder_does_not_see_add_nothing():
    """Its first half alone is looked at."""

    class LowBands(LogMelStatistics):
        def forward(self, features, lengths=None):
            return super().forward(features[..., :10], lengths)

    torch.manual_seed(0)
    normalise = InputNormalization(norm_type="sentence", std_norm=False)
    encoder = Encoder(Fbank(n_mels=20), LowBands(), normalise)
    wavs = torch.randn(8000), torch.randn(6000) * torch.linspace(0, 1, 6000)
    found = Explainer(encoder)(*wavs)
    check(found, encoder, wavs)
    features = found.maps["features"]
    assert features.hop == 0.01 and len(features.values) == 38
    assert np.abs(features.values[:, 10:]).max() == 0
    assert np.abs(features.values[:, :10]).max() > 0
    by_band = np.abs(found.maps["waveform"].values).sum(0)
    heard = found.maps["waveform"].hz < features.hz[10]
    assert by_band[heard].mean() > 5 * by_band[~heard][1:].mean()


def test_encoders_without_bands_are_explained_by_their_waveform():
    """Frames in the place of features, and networks that take waveforms."""
    torch.manual_seed(0)
    wavs = torch.randn(2, 4000)
    for encoder in (tiny_encoder(), Frozen()):
        found = Explainer(encoder)(*wavs)
        assert list(found.maps) == ["waveform"]
        check(found, encoder, wavs)
        assert np.abs(found.maps["waveform"].values).sum() > 1e-3


def test_each_bin_of_a_spectrum_is_in_one_band():
    hz, bands = mel_bands(257, 16000)
    assert (bands.sum(1) == 1).all() and (bands.sum(0) > 0).all()
    of_bin = np.linspace(0, 8000, 257)
    for band in range(len(hz)):
        inside = of_bin[bands[:, band].numpy() == 1]
        assert inside.min() - 32 < hz[band] < inside.max() + 32


def test_layers_of_a_pre_trained_speech_model_sum_to_its_score():
    """Frozen, of a tiny WavLM; its head weighs all three states alike."""
    torch.manual_seed(0)
    head = functools.partial(MHFA, embedding_size=8, heads=2)
    encoder = Encoder(Waveform, SpeechModel(config(), head))
    wavs = torch.randn(8000), torch.randn(6000)
    found = Explainer(encoder, over=("waveform", "layers"))(*wavs)
    check(found, encoder, wavs)
    path = found.paths["layers"]
    change = path.score - found.paths["waveform"].baseline_score
    assert len(found.layers) == 3 and np.abs(found.layers).min() > 1e-5
    assert found.layers.sum() == pytest.approx(change, abs=0.006)


def test_a_path_that_an_encoder_lacks_is_refused():
    with pytest.raises(ValueError, match="no layers .* it has waveform$"):
        Explainer(tiny_encoder(), over=("layers",))
