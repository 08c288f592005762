"""Integrated gradients against exact answers, scipy's quadrature, and sums."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.integrate import quad_vec
from speechbrain.lobes.features import MFCC, Fbank
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN

from lgl_plugin.nnet.attribution import (
    band_centres,
    by_frequency,
    integrated_gradients,
    layers_of,
    shaped_noise,
)
from lgl_plugin.nnet.features import KaldiFbank


@settings(max_examples=20)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 99))
def test_of_a_linear_score_each_value_has_its_own_part(size, steps, seed):
    """However many steps, in whatever batches."""
    torch.manual_seed(seed)
    weights, x, baseline = torch.randn(3, size, dtype=torch.float64)
    found = integrated_gradients(
        lambda points: points @ weights, x, baseline, steps, batch_size=3
    )
    torch.testing.assert_close(found.values, weights * (x - baseline))
    assert found.steps == min(steps, 32) and found.error < 1e-9


def network(seed=0):
    """A smooth score of six numbers, of which every second counts double."""
    torch.manual_seed(seed)
    first, second = torch.randn(8, 6).double(), torch.randn(8).double()
    return lambda points: (points @ first.T).tanh() @ second


def test_a_path_is_integrated_as_scipy_does():
    score = network()
    x, baseline = torch.randn(2, 6, dtype=torch.float64)

    def gradient(place):
        point = (baseline + place * (x - baseline)).requires_grad_()
        (found,) = torch.autograd.grad(score(point[None]).sum(), point)
        return found.numpy()

    expected, _ = quad_vec(gradient, 0, 1)
    found = integrated_gradients(score, x, baseline, limit=1e-9)
    np.testing.assert_allclose(found.gradient, expected, atol=1e-9)
    change = score(x[None]) - score(baseline[None])
    torch.testing.assert_close(found.values.sum(), change[0])


def test_steps_are_doubled_until_the_sum_is_right_or_refused():
    """A step of the score within a hundredth of the path."""

    def steep(points):
        return (300 * (points[:, 0] - 0.503)).tanh()

    x = torch.ones(1, dtype=torch.float64)
    found = integrated_gradients(steep, x, 0 * x, steps=1024)
    assert found.steps > 32 and found.error <= 0.05
    with pytest.raises(ValueError, match="more steps, such as 128"):
        integrated_gradients(steep, x, 0 * x, steps=32)


def test_a_score_without_a_gradient_is_refused():
    x = torch.ones(3)
    with pytest.raises(ValueError, match="has no gradient"):
        integrated_gradients(lambda p: p.detach().sum(1), x, 0 * x)


def test_frequencies_of_a_waveform_have_all_of_it_in_their_place():
    """A tone of 1 kHz, of which the second half counts."""
    time = torch.arange(8000).double() / 16000
    tone = (2000 * np.pi * time).sin()
    gradient = torch.where(time < 0.25, 0, tone)
    parts = by_frequency(gradient, tone, 512)
    torch.testing.assert_close(parts.sum(), gradient @ tone)
    by_bin = parts.sum(0)
    assert by_bin.argmax() == 1000 / (16000 / 512)
    by_frame = parts.sum(1)
    assert by_frame[:15].abs().max() < 1e-9 < by_frame[18:].min()


def test_noise_has_the_spectrum_of_the_speech():
    wav = torch.randn(4001) * torch.linspace(0, 3, 4001)
    noise = shaped_noise(wav, seed=1)
    torch.testing.assert_close(
        torch.fft.rfft(noise).abs(),
        torch.fft.rfft(wav).abs(),
        atol=1e-2,
        rtol=0,
    )
    early, late = (x.square().mean() for x in noise.chunk(2))
    assert 0.8 < early / late < 1.25  # of the speech 1 to 7
    assert torch.equal(noise, shaped_noise(wav, seed=1))
    assert not torch.equal(noise, shaped_noise(wav, seed=2))


@pytest.mark.parametrize("n_mels", [40, 80])
def test_bands_lie_where_speechbrain_puts_them(n_mels):
    """But for rounding to 10 Hz and bins of 40 Hz."""
    features = Fbank(n_mels=n_mels)
    centres = features.compute_fbanks.f_central.numpy()
    found = band_centres(features, 16000)
    assert np.abs(found - centres).max() < 25
    assert (np.diff(found) >= 0).all()


def test_front_ends_without_bands_are_known():
    assert band_centres(MFCC(), 16000) is None
    assert band_centres(torch.nn.Linear(1600, 40), 16000) is None
    assert 7000 < band_centres(KaldiFbank(), 16000)[-1] < 8000


def test_layers_that_a_network_joins_sum_to_the_score():
    """From the blocks of a small ECAPA-TDNN, whose input stays as it is."""
    torch.manual_seed(0)
    model = ECAPA_TDNN(
        8, channels=[8, 8, 8, 8, 12], attention_channels=4, lin_neurons=6,
        se_channels=4, res2net_scale=2,
    ).eval()  # fmt: skip
    layers = layers_of(model)
    assert layers.part is model.mfa and layers.number == 3
    features, baseline = torch.randn(2, 1, 20, 8)
    with torch.no_grad():
        start, end = (
            layers.outputs(lambda x=x: model(x))[0]
            for x in (baseline, features)
        )

    def score(hidden):
        with layers.given(hidden):
            return model(features.expand(len(hidden), -1, -1))[:, 0, 0]

    found = integrated_gradients(score, end, start, limit=0.01)
    with torch.no_grad():
        change = model(features)[0, 0, 0] - model(baseline)[0, 0, 0]
    by_layer = layers.sums(found.values)
    assert len(by_layer) == 3 and np.abs(by_layer).min() > 1e-4
    assert sum(by_layer) == pytest.approx(float(change), abs=1e-2)
    assert not layers.part._forward_pre_hooks
