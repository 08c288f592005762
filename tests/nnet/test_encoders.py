"""The encoder contract: waveforms and lengths in, embeddings out."""

import copy
import functools

import numpy as np
import pytest
import torch
from speechbrain.lobes.features import Fbank
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
from speechbrain.processing.features import InputNormalization
from tiny_brains import DIM
from tiny_encoders import ECAPA, FBANK, MEAN_NORM, NETWORKS

from lgl_plugin.nnet.encoders import Encoder, LogMelStatistics
from lgl_plugin.nnet.features import Waveform
from lgl_plugin.runs.weights import load_weights, save_weights

SIZES = [24000, 16000, 9000, 8999]
# SpeechBrain's statistics pooling adds noise of 1e-5 to an x-vector.
TOLERANCE = {"ecapa": 1e-5, "xvector": 1e-4, "resnet": 1e-5}


def ready(encoder):
    """An encoder past its first steps, for running statistics of its own."""
    with torch.no_grad():
        for _ in range(10):
            encoder(torch.randn(8, 16000) / 9)
    return encoder.eval()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def encoders():
    """An encoder of each network, with and without normalisation."""
    torch.manual_seed(0)
    return {
        (name, norm): ready(Encoder(FBANK, new, MEAN_NORM if norm else None))
        for name, new in NETWORKS.items()
        for norm in (True, False)
    }


def padded():
    """Waveforms of several lengths and loudness, zeros behind them."""
    waveforms = torch.randn(len(SIZES), max(SIZES)) / 9
    waveforms *= torch.tensor([1.0, 0.001, 1.0, 0.3])[:, None]
    for waveform, size in zip(waveforms, SIZES):
        waveform[size:] = 0
    return waveforms, torch.tensor(SIZES) / max(SIZES)


@torch.no_grad()
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_padded_is_as_alone(encoders, name, norm):
    encoder, tolerance = encoders[name, norm], TOLERANCE[name]
    waveforms, lengths = padded()
    found = encoder(waveforms, lengths)
    assert found.shape == (len(SIZES), DIM) and found.dtype == torch.float32
    for vector, wav, size in zip(found, waveforms, SIZES):
        alone = encoder(wav[None, :size])
        torch.testing.assert_close(vector, alone[0], rtol=0, atol=tolerance)
        whole = encoder(wav[None, :size], torch.ones(1))
        torch.testing.assert_close(vector, whole[0], rtol=0, atol=tolerance)
    # The test would see utterances that are mixed up.
    assert (found - found.roll(1, 0)).abs().max() > 100 * tolerance


@torch.no_grad()
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_alone_is_as_speechbrains_modules_give_it(encoders, name, norm):
    encoder = encoders[name, norm]
    waveform = torch.randn(1, 16000) / 9
    features = Fbank(n_mels=80)(waveform)
    if norm:
        features = MEAN_NORM()(features, torch.ones(1))
    expected = encoder.network(features).flatten(1)
    torch.testing.assert_close(
        encoder(waveform), expected, rtol=0, atol=TOLERANCE[name]
    )


def test_padding_of_ecapa_needs_the_lengths(encoders):
    """Without, zeros are taken for silence that was recorded."""
    waveforms, lengths = padded()
    encoder = encoders["ecapa", True]
    with torch.no_grad():
        difference = encoder(waveforms) - encoder(waveforms, lengths)
    assert difference[0].abs().max() < 1e-5
    assert difference[1:].abs().amax(1).min() > 1e-3


def test_a_forward_leaves_the_network_as_it_was(encoders):
    """The patches of convolutions and pooling end with it."""
    encoder = encoders["ecapa", True]
    waveforms, lengths = padded()
    with torch.no_grad():
        first = encoder(waveforms, lengths)
        assert torch.equal(encoder(waveforms, lengths), first)
    for module in encoder.modules():
        assert "forward" not in vars(module)
        assert not module._forward_pre_hooks
        assert getattr(module, "padding", None) != "valid"
    assert len(copy.deepcopy(encoder).state_dict()) > 0


def test_the_network_learns():
    encoder = Encoder(FBANK, ECAPA, MEAN_NORM)
    assert encoder.training
    encoder(torch.randn(4, 8000) / 9).square().sum().backward()
    parameters = dict(encoder.named_parameters())
    assert all(name.startswith("network.") for name in parameters)
    assert all(p.grad.isfinite().all() for p in parameters.values())


def test_embeddings_are_float32_under_autocast(encoders):
    waveforms, lengths = padded()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for given in ((waveforms,), (waveforms, lengths)):
            found = encoders["ecapa", True](*given)
            assert found.dtype == torch.float32


# Parts


def test_factories_give_each_encoder_modules_of_its_own():
    """As `!name:` of a yaml; a class is one, too."""
    first, second = (Encoder(FBANK, ECAPA, MEAN_NORM) for _ in range(2))
    assert isinstance(first.features, Fbank)
    assert isinstance(first.normalise, InputNormalization)
    assert isinstance(first.network, ECAPA_TDNN)
    for name, part in first.named_children():
        assert part is not getattr(second, name)
    assert isinstance(
        Encoder(Fbank, LogMelStatistics).network, LogMelStatistics
    )


def test_modules_are_taken_as_they_are():
    parts = FBANK(), ECAPA(), MEAN_NORM()
    encoder = Encoder(*parts)
    found = encoder.features, encoder.network, encoder.normalise
    assert all(a is b for a, b in zip(found, parts))
    alike = Encoder(parts[0], network=ECAPA)
    assert alike.features is parts[0] and alike.normalise is None


@pytest.mark.parametrize(
    ("network", "frames"),
    [
        (ECAPA, 4),  # a kernel of 3, 4 frames apart
        (functools.partial(ECAPA, dilations=[1, 2, 3, 6, 1]), 6),
        (NETWORKS["xvector"], 3),
        (LogMelStatistics, 0),
    ],
)
def test_the_shortest_waveform_is_named(network, frames):
    encoder = Encoder(FBANK, network).eval()
    assert encoder.min_samples == 160 * frames
    shortest = torch.randn(1, max(1, encoder.min_samples)) / 9
    with torch.no_grad():
        assert encoder(shortest).isfinite().all()
        if frames:
            with pytest.raises(RuntimeError, match="[Pp]ad"):
                encoder(shortest[:, 1:])


def test_a_hop_of_another_length_counts():
    features = functools.partial(Fbank, n_mels=80, hop_length=20)
    encoder = ready(Encoder(features, ECAPA))
    assert encoder.min_samples == 4 * 320
    waveforms, lengths = padded()
    with torch.no_grad():
        found = encoder(waveforms, lengths)
        alone = encoder(waveforms[2:3, : SIZES[2]])
    torch.testing.assert_close(found[2:3], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_checkpoint_has_speechbrains_plain_keys(encoders, name, tmp_path):
    encoder, path = encoders[name, True], tmp_path / "embedding_model.ckpt"
    save_weights(encoder.network, path)
    state = torch.load(path, weights_only=True)
    plain = NETWORKS[name]()  # without the package's encoder around it
    assert list(state) == list(plain.state_dict())
    plain.load_state_dict(state, strict=True)
    again = Encoder(FBANK, NETWORKS[name], MEAN_NORM).eval()
    load_weights(again.network, path)
    waveform = torch.randn(1, 16000) / 9
    with torch.no_grad():
        torch.testing.assert_close(
            again(waveform), encoder(waveform), rtol=0, atol=TOLERANCE[name]
        )


# Log-mel statistics


def test_log_mel_statistics_are_numpys_over_the_counted_frames():
    rng = np.random.default_rng(0)
    features = rng.normal(3, 2, (4, 50, 6)).astype(np.float32)
    lengths = [1.0, 0.5, 0.02, 0.9]
    found = LogMelStatistics()(
        torch.from_numpy(features), torch.tensor(lengths)
    ).numpy()
    for row, length, frames in zip(found, lengths, features.astype(float)):
        counted = frames[: round(50 * length)]
        expected = np.concatenate([counted.mean(0), counted.std(0)])
        # A deviation of none is kept off zero, at 1e-5.
        np.testing.assert_allclose(row[0], expected, rtol=1e-4, atol=2e-5)


def test_frozen_statistics_stay_and_the_weights_learn():
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(9, 4), torch.nn.BatchNorm1d(4)
    )
    encoder = Encoder(Waveform(), network)
    encoder.freeze_statistics()
    wavs, before = torch.randn(8, 9), copy.deepcopy(network.state_dict())
    parts = torch.nn.ModuleDict({"encoder": encoder}).train()
    found = parts["encoder"](wavs)
    # By the statistics that were there, 0 and 1, not by the batch's.
    torch.testing.assert_close(found, network[:2](wavs), atol=1e-4, rtol=1e-4)
    optimiser = torch.optim.SGD(encoder.parameters(), 0.1)
    found.square().sum().backward()
    optimiser.step()
    after = network.state_dict()
    for name in before:
        same = torch.equal(before[name], after[name])
        assert same == ("running" in name or "num_batches" in name), name
    assert network.training and not encoder.eval().training


def test_statistics_of_a_network_without_any_cannot_be_frozen():
    encoder = Encoder(Waveform(), torch.nn.Flatten())
    with pytest.raises(ValueError, match="freeze_batch_statistics: the enc"):
        encoder.freeze_statistics()


def test_only_weights_with_a_pattern_in_their_name_are_trained():
    """The others stay as they came, bit for bit, also under weight decay."""
    network = torch.nn.Sequential(
        *(torch.nn.Linear(9, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)),
    )
    network[0].bias.requires_grad_(False)
    encoder = Encoder(Waveform(), network)
    encoder.train_only("^2|bias$")
    before = copy.deepcopy(network.state_dict())
    parameters = encoder.parameters()
    optimiser = torch.optim.AdamW(parameters, 0.1, weight_decay=0.5)
    encoder(torch.randn(4, 9)).square().sum().backward()
    optimiser.step()
    changed = {
        name
        for name, value in network.state_dict().items()
        if not torch.equal(value, before[name])
    }
    # A weight that was fixed before stays fixed.
    assert changed == {"2.weight", "2.bias"}


def test_normalisation_that_is_not_trained_keeps_its_statistics():
    network = torch.nn.Sequential(
        *(torch.nn.Linear(9, 9), torch.nn.BatchNorm1d(9)),
        *(torch.nn.Linear(9, 9), torch.nn.BatchNorm1d(9)),
    )
    encoder = Encoder(Waveform(), network)
    encoder.train_only("^[23]")
    encoder.train()(torch.randn(8, 9) + 3)
    assert network[1].num_batches_tracked == 0
    assert network[3].num_batches_tracked == 1


def test_a_pattern_without_weights_names_those_there_are():
    network = torch.nn.Sequential(torch.nn.Linear(9, 5), torch.nn.Linear(5, 3))
    encoder = Encoder(Waveform(), network)
    said = r"no weight of the encoder has 'dense' .* 0.weight, 0.bias, 1.weight"
    with pytest.raises(ValueError, match=said):
        encoder.train_only("dense")
    assert all(weight.requires_grad for weight in network.parameters())


class Scaled(torch.nn.Module):
    """A front end with a weight."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return FBANK()(x) * self.scale


def test_weights_that_no_checkpoint_keeps_are_refused():
    with pytest.raises(ValueError, match="features, Scaled, has weights"):
        Encoder(Scaled, NETWORKS["ecapa"])
    corpus = InputNormalization(norm_type="global")
    with pytest.raises(ValueError, match="norm_type: global"):
        Encoder(FBANK, NETWORKS["ecapa"], corpus)
