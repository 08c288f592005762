"""SpeechBrain's features, kept on the device: the same values, no copies."""

import copy
import pickle

import pytest
import torch
from devices import DEVICES
from pretended_device import Waits, nothing_waits, present
from speechbrain.lobes.features import Fbank
from speechbrain.processing.features import Filterbank

from lgl_plugin.nnet.fbank_patches import keep_on_device
from lgl_plugin.utils.speechbrain_internals import ResidentFilterbank


def kept(**settings):
    features = Fbank(**settings)
    keep_on_device(features)
    return features


@pytest.mark.parametrize(
    "settings",
    [
        {"n_mels": 80},
        {"n_mels": 24, "sample_rate": 8000, "n_fft": 256, "hop_length": 20},
        {"filter_shape": "rectangular", "f_min": 50, "deltas": True},
        {"filter_shape": "gaussian", "context": True},
    ],
)
def test_the_features_are_speechbrains(settings):
    wavs = torch.randn(3, 4000, generator=torch.Generator().manual_seed(1))
    expected = Fbank(**settings)(wavs)
    features = kept(**settings)
    keep_on_device(features)  # as an encoder that shares them does
    duplicate = pickle.loads(pickle.dumps(copy.deepcopy(features)))
    for found in (features(wavs), duplicate(wavs)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert features.state_dict().keys() == Fbank().state_dict().keys()


@pytest.mark.parametrize(
    "settings", [{"requires_grad": True}, {"param_rand_factor": 0.1}]
)
def test_filters_that_change_stay_speechbrains(settings):
    assert type(kept(**settings).compute_fbanks) is Filterbank
    assert type(kept().compute_fbanks) is ResidentFilterbank


@pytest.mark.parametrize("device", DEVICES)
def test_the_host_waits_for_speechbrains_own_and_not_for_these(device):
    """The patch can go once SpeechBrain's own features do not wait."""
    with present(device):
        wavs = torch.randn(2, 1600, device=device)
        features = kept(n_mels=20).to(device)
        features(wavs)  # plans may be made at first
        with nothing_waits(device):
            features(wavs)
        theirs = Fbank(n_mels=20).to(device)
        with nothing_waits(device), pytest.raises((Waits, RuntimeError)):
            theirs(wavs)
