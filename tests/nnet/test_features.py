"""Kaldi's features, of a whole batch."""

import pytest
import torch
from torchaudio.compliance import kaldi

from lgl_plugin.nnet.features import KaldiFbank


@pytest.mark.parametrize(
    ("rate", "n_mels", "n_samples"),
    [(16000, 80, 16123), (16000, 80, 400), (8000, 24, 4001)],
)
def test_equal_to_torchaudios_of_one_after_another(rate, n_mels, n_samples):
    torch.manual_seed(0)
    # Speech-like, an offset, near silence: the floor of the logarithm counts.
    waveforms = torch.randn(3, n_samples).cumsum(1) / 100
    waveforms[1] += 0.3
    waveforms[2] *= 1e-6
    found = KaldiFbank(n_mels, rate)(waveforms)
    options = {"num_mel_bins": n_mels, "sample_frequency": rate, "dither": 0.0}
    for row, waveform in zip(found, waveforms):
        expected = kaldi.fbank(waveform[None], **options)
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-5)


def test_float32_under_autocast():
    waveforms, fbank = torch.randn(2, 8000) / 9, KaldiFbank()
    with torch.autocast("cpu", torch.bfloat16):
        found = fbank(waveforms.bfloat16())
        assert found.dtype == torch.float32
        assert torch.equal(fbank(waveforms.bfloat16().float()), found)


def test_no_part_of_a_checkpoint():
    assert not KaldiFbank().state_dict()
