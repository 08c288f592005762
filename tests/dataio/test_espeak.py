"""espeak-ng's voices: pitch by sex, refusals."""

import re
import sys

import numpy as np
import pytest

from lgl_plugin.dataio.espeak import ESPEAK_RATE, Espeak, voice_file
from lgl_plugin.dataio.synthetic import make_corpus


def fundamental(signal):
    """The median over frames of the autocorrelation's peak, in Hz."""
    frames = signal[: len(signal) // 1024 * 1024].reshape(-1, 1024) / 32768
    frames = frames[np.mean(frames**2, axis=1) > 1e-3]
    spectra = np.abs(np.fft.rfft(frames, 2048)) ** 2
    lags = np.fft.irfft(spectra)[:, 60:400]
    return np.median(ESPEAK_RATE / (60 + lags.argmax(axis=1)))


@pytest.mark.parametrize("sex, low, high", [("f", 145, 275), ("m", 80, 155)])
def test_voices_have_the_pitch_of_their_sex(sex, low, high):
    text = "Rosa remembered the quiet garden near the old harbour."
    for seed in range(5):
        voice = voice_file(np.random.default_rng(seed), sex)
        speech = Espeak(voice).say(text, 10**6, pitch=50, seed=0)
        base, top = map(int, re.findall(r"^pitch (\d+) (\d+)", voice, re.M)[-1])
        assert low < base < high
        assert 0.9 * base < fundamental(speech) < 1.05 * top


def test_a_missing_espeak_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ModuleNotFoundError, match="pip install espeakng-load"):
        make_corpus(tmp_path / "corpus")
    assert not list(tmp_path.iterdir())


def test_espeak_refuses_an_empty_voice():
    with pytest.raises(RuntimeError, match="refused the voice"):
        Espeak("")
