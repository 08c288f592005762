"""Log-mel frames on disk, and what speech models read."""

import numpy as np
import torch
from transformers import SeamlessM4TFeatureExtractor

from lgl_plugin.inference.log_mel_frames import LogMels, write_log_mels
from lgl_plugin.nnet.features import model_inputs


def test_inputs_are_those_of_transformers(tmp_path):
    """But for the rounding to 16 bits on disk."""
    torch.manual_seed(0)
    waveforms = [0.1 * torch.randn(n) for n in (8000, 8160)]
    write_log_mels(iter(waveforms), tmp_path)
    log_mels = LogMels(tmp_path)
    extract = SeamlessM4TFeatureExtractor()
    for row, waveform in enumerate(waveforms):
        wanted = extract(
            waveform.numpy(), sampling_rate=16000, return_tensors="pt"
        )
        n_frames = int(wanted.attention_mask.sum())
        found = model_inputs(log_mels[row][None])
        assert found.shape == (1, n_frames, 160)
        torch.testing.assert_close(
            found, wanted.input_features[:, :n_frames], atol=0.05, rtol=0
        )


def test_what_is_there_is_not_made_again(tmp_path):
    write_log_mels([torch.ones(800)], tmp_path)

    def fails():
        raise AssertionError("read again")
        yield

    write_log_mels(fails(), tmp_path)
    assert [len(one) for one in LogMels(tmp_path)] == [3]


def test_crops_of_a_short_utterance_repeat_it(tmp_path):
    torch.manual_seed(0)
    write_log_mels([torch.randn(1600), torch.randn(4000)], tmp_path)
    log_mels = LogMels(tmp_path)
    rng = np.random.default_rng(0)
    crop = log_mels.crop(0, 12, rng)
    whole = log_mels[0].repeat(3, 1)
    assert any(crop.equal(whole[n : n + 12]) for n in range(8))
    assert log_mels.crop(1, 12, rng).shape == (12, 80)
