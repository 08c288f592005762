"""Pre-trained speech models: padding, sleep, what is trained, what is said."""

import functools
import sys

import pytest
import tiny_speech
import torch
from speechbrain.integrations.huggingface.w2v_bert import W2VBert
from speechbrain.integrations.huggingface.wavlm import WavLM

from lgl_plugin.nnet.encoders import Encoder
from lgl_plugin.nnet.features import Waveform
from lgl_plugin.nnet.speech_heads import MHFA, LayerAdapters, WeightedECAPA
from lgl_plugin.nnet.speech_model import SpeechModel

DIM, SIZES = 12, [12000, 8000, 4001, 4000]
HEADS = {
    "ecapa": functools.partial(
        WeightedECAPA,
        embedding_size=DIM,
        channels=[8, 8, 8, 8, 24],
        attention_channels=8,
    ),
    "mhfa": functools.partial(MHFA, embedding_size=DIM, heads=4, inside=8),
    "adapters": functools.partial(
        LayerAdapters, embedding_size=DIM, inside=8, attention_channels=8
    ),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def model(head="mhfa", train="head", rank=0, **options):
    wanted = tiny_speech.config(**options)
    return SpeechModel(wanted, HEADS[head], train, rank=rank, normalise=True)


def padded():
    waveforms = torch.randn(len(SIZES), max(SIZES)) / 9
    waveforms *= torch.tensor([1.0, 0.001, 1.0, 0.3])[:, None]
    for waveform, size in zip(waveforms, SIZES):
        waveform[size:] = 0
    return waveforms, torch.tensor(SIZES) / max(SIZES)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "norm", "head"),
    [
        ("wavlm", "group", "mhfa"),
        ("wavlm", "layer", "ecapa"),
        ("hubert", "group", "adapters"),
        ("hubert", "layer", "mhfa"),
        ("wav2vec2", "group", "ecapa"),
        ("wav2vec2", "layer", "adapters"),
        ("wav2vec2-bert", None, "ecapa"),
    ],
)
def test_padded_is_as_alone(family, norm, head):
    encoder = Encoder(Waveform, model(head, family=family, norm=norm)).eval()
    assert not encoder.one_by_one
    waveforms, lengths = padded()
    found = encoder(waveforms, lengths)
    assert found.shape == (len(SIZES), DIM) and found.dtype == torch.float32
    for vector, wav, size in zip(found, waveforms, SIZES):
        alone = encoder(wav[None, :size])
        torch.testing.assert_close(vector, alone[0], rtol=0, atol=2e-6)
        # As SpeechBrain's inference calls it, without an Encoder around it.
        bare = encoder.network(wav[None], torch.tensor([size / max(SIZES)]))
        torch.testing.assert_close(bare[0, 0], vector, rtol=0, atol=2e-6)
    assert (found - found.roll(1, 0)).abs().max() > 1e-3
    shortest = waveforms[:1, : encoder.min_samples]
    assert encoder(shortest).isfinite().all()
    if head != "adapters":  # a lone frame has no deviation, but no error
        with pytest.raises(RuntimeError):
            encoder(shortest[:, 1:])


@torch.no_grad()
def test_group_normalisation_alone_would_let_padding_in():
    """Which transformers' mask, and SpeechBrain's wrapper, do."""
    network = model(norm="group").eval()
    wav, n = torch.randn(1, 8000) / 9, 4000
    wav[:, n:] = 0
    mask = torch.arange(8000)[None] < n
    alone = network.states(wav[:, :n])[0]
    leaky = network.front(
        wav, attention_mask=mask.long(), output_hidden_states=True
    )
    frames = alone.shape[2]
    leaky = torch.stack(leaky.hidden_states)[:, :, :frames]
    assert (leaky - alone).abs().max() > 0.1
    tight, counts = network.states(wav, torch.tensor([n / 8000]))
    assert counts.tolist() == [frames]
    torch.testing.assert_close(tight[:, :, :frames], alone, rtol=0, atol=2e-6)
    # The patch ends with the forward.
    norm = network.front.feature_extractor.conv_layers[0].layer_norm
    assert "forward" not in vars(norm)


@torch.no_grad()
@pytest.mark.parametrize(
    ("wrapper", "options"),
    [
        (WavLM, {"norm": "layer", "normalise": True}),
        (WavLM, {"norm": "group", "normalise": False}),
        (W2VBert, {"family": "wav2vec2-bert"}),
    ],
)
def test_states_of_a_lone_waveform_are_speechbrains(tmp_path, wrapper, options):
    source = tiny_speech.save(tmp_path, **options)
    theirs = wrapper(source, str(tmp_path), output_all_hiddens=True).eval()
    wav = torch.randn(1, 8240) / 9 + 0.1
    found, _ = SpeechModel(source, HEADS["mhfa"]).states(wav)
    torch.testing.assert_close(found, theirs(wav), rtol=0, atol=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_frames_of_padding_change_no_embedding(head):
    """Whatever stands there."""
    module = HEADS[head](n_states=3, width=16).eval()
    states, n_frames = torch.randn(3, 2, 30, 16), torch.tensor([30, 20])
    found = module(states, n_frames)
    states[:, 1, 20:] = 1e3
    torch.testing.assert_close(module(states, n_frames), found)
    alone = module(states[:, 1:, :20])
    torch.testing.assert_close(found[1:], alone, rtol=0, atol=1e-5)


def test_what_is_frozen_sleeps_in_training():
    awake = {
        "hidden_dropout": 0.5,
        "attention_dropout": 0.5,
        "feat_proj_dropout": 0.5,
        "layerdrop": 0.5,
        "mask_time_prob": 0.5,
        "mask_feature_prob": 0.5,
    }
    wav = torch.randn(2, 8000)
    asleep = Encoder(Waveform, model(**awake))
    before = asleep.network.states(wav)[0]
    asleep.eval().train()
    assert asleep.training and asleep.network.head.training
    assert torch.equal(asleep.network.states(wav)[0], before)
    trained = model(train="layers", **awake).train()
    first, second = (trained.states(wav)[0] for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("train", ["head", "layers", "lora"])
def test_only_what_should_is_trained(train):
    network = model(train=train, rank=4 if train == "lora" else 0)
    before = {n: p.clone() for n, p in network.state_dict().items()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(2):  # LoRA's down has no gradient while up is 0
        network(torch.randn(4, 4000)).square().sum().backward()
        optimizer.step()
    moved = {
        name
        for name, value in network.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert any(name.startswith("head.") for name in moved)
    front = {name for name in moved if name.startswith("front.")}
    if train == "head":
        assert not front
    elif train == "layers":
        layers = "front.encoder.layers."
        assert front == {name for name in before if name.startswith(layers)}
    else:
        places = {name.partition(".parametrizations.")[0] for name in front}
        expected = {
            f"front.encoder.layers.{i}.attention.{part}"
            for i in range(2)
            for part in ("q_proj", "v_proj")
        }
        assert places == expected
        assert not [name for name in front if name.endswith("original")]


@pytest.mark.parametrize("family", ["wavlm", "hubert", "wav2vec2"])
def test_no_gradient_goes_back_through_frozen_convolutions(family):
    network = model(train="layers", family=family).train()
    found = []
    network.front.feature_extractor.register_forward_hook(
        lambda part, given, made: found.append(made.requires_grad)
    )
    assert network(torch.randn(2, 4000)).requires_grad
    assert found == [False]


def test_lora_begins_as_the_model_and_adds_twice_the_product():
    torch.manual_seed(1)
    plain = model()
    network = model(train="lora", rank=3).eval()
    weights = {
        name: network.state_dict()[
            name.replace(".weight", ".parametrizations.weight.original")
            if name.endswith(("q_proj.weight", "v_proj.weight"))
            else name
        ]
        for name in plain.state_dict()
    }
    plain.load_state_dict(weights)
    wav = torch.randn(1, 4000)
    assert torch.equal(network(wav), plain.eval()(wav))
    query = network.front.encoder.layers[1].attention.q_proj
    low = query.parametrizations.weight[0]
    torch.nn.init.normal_(low.up)
    added = plain.front.encoder.layers[1].attention.q_proj.weight
    with torch.no_grad():
        added += 2 * low.up @ low.down
    torch.testing.assert_close(network(wav), plain(wav))
    assert (network(wav) - model()(wav)).abs().max() > 1e-3


def test_learning_rates_fall_from_layer_to_layer():
    network = SpeechModel(
        tiny_speech.config(num_hidden_layers=3),
        HEADS["mhfa"],
        train="layers",
        lr_scale=0.1,
        decay=0.5,
    )
    scales = network.lr_scales()
    for number, layer in enumerate(network.front.encoder.layers):
        for parameter in layer.parameters():
            assert scales[parameter] == pytest.approx(0.1 * 0.5 ** (2 - number))
    assert not any(p in scales for p in network.head.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train": "all"}, "train: all is none of head, layers, lora"),
        ({"lr_scale": 0.5}, "change nothing"),
        ({"train": "layers", "decay": 1.5}, "at most 1"),
        ({"train": "layers", "rank": 4}, "rank"),
        ({"train": "lora"}, "rank"),
        ({"source": {"model_type": "bert"}}, "bert, which is none of wavlm"),
        ({"source": "no/such/folder/is"}, "is no speech model"),
    ],
)
def test_what_cannot_work_is_refused(options, words):
    options = {"source": tiny_speech.config(), **options}
    for refuse in (SpeechModel.check_arguments, SpeechModel):
        with pytest.raises(ValueError, match=words):
            refuse(head=HEADS["mhfa"], **options)


def test_a_source_that_lacks_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    source = tiny_speech.save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = "encoder.layers.1.attention.q_proj.weight"
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks weights, such as {lost}"):
        SpeechModel(source, HEADS["mhfa"])


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="pip install transformers"):
        SpeechModel.check_arguments("a/folder", HEADS["mhfa"])
