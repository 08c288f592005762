"""The patches of ECAPA: padded batches as if alone, and lean pooling."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from speechbrain.dataio.dataio import length_to_mask
from speechbrain.lobes.features import Fbank
from speechbrain.lobes.models.ECAPA_TDNN import (
    ECAPA_TDNN,
    AttentiveStatisticsPooling,
)
from speechbrain.nnet.CNN import Conv1d
from speechbrain.nnet.linear import Linear
from speechbrain.processing.features import (
    InputNormalization,
    make_padding_mask,
)

from lgl_plugin.nnet.ecapa_patches import (
    lean_pooling,
    padding_invariant,
    reflected_frames,
    relative_lengths,
)

RATE, HOP = 16000, 160
LENGTHS = torch.tensor([0.31, 1.0, 0.77])


# Padded batches


def test_relative_lengths_select_exactly_the_frames():
    for total in [*range(1, 400), 1201, 6001]:
        n_frames = torch.arange(max(1, total - 400), total + 1)
        lengths = relative_lengths(n_frames, total)
        assert lengths.dtype == torch.float32
        x = torch.empty(len(lengths), total, 1)
        for mask in (
            length_to_mask(lengths * total, total),
            make_padding_mask(x, lengths)[..., 0],
        ):
            assert torch.equal(mask.sum(1).long(), n_frames)
        assert torch.equal((lengths * total).round().long(), n_frames)


@settings(deadline=None)
@given(
    kernel=st.sampled_from([1, 3, 5, 7]),
    dilation=st.integers(1, 4),
    more=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    skip_transpose=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_convolution_reflects_each_utterance_at_its_own_end(
    kernel, dilation, more, skip_transpose, seed
):
    torch.manual_seed(seed)
    conv = Conv1d(
        4, kernel, in_channels=12 * dilation, dilation=dilation,
        skip_transpose=skip_transpose,
    )  # fmt: skip
    shortest = reflected_frames(conv) + 1
    n_frames = torch.tensor([shortest - 1 + n for n in more])
    shape = (len(more), int(n_frames.max()), 12 * dilation)
    x = torch.randn(shape)  # filled with anything
    time = 2 if skip_transpose else 1
    turned = x.transpose(1, 2) if skip_transpose else x
    before = turned.clone()
    with torch.no_grad():
        with padding_invariant(Linear(1, input_size=1), conv, n_frames):
            together = conv(turned)
        assert torch.equal(turned, before)
        for row, n in enumerate(n_frames.tolist()):
            alone = conv(turned[row : row + 1].narrow(time, 0, n))
            found = together[row : row + 1].narrow(time, 0, n)
            torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)


def test_causal_and_unpadded_convolutions_are_left_alone():
    x = torch.randn(2, 20, 8)
    for options in ({"padding": "causal"}, {"padding_mode": "constant"}):
        conv = Conv1d(4, 3, in_channels=8, **options)
        assert reflected_frames(conv) == 0
        with torch.no_grad():
            expected = conv(x)
            with padding_invariant(conv, conv, torch.tensor([10, 20])):
                assert torch.equal(conv(x), expected)


def test_the_loudest_frame_is_looked_for_before_the_end():
    # A click in the last samples is loudest in a frame behind the end.
    torch.manual_seed(0)
    wav = torch.zeros(1, 50 * HOP - 1)
    wav[0, :2000] = torch.randn(2000) * 1e-4
    wav[0, -5:] = 1.0
    fbank = Fbank(n_mels=80)
    filled = torch.nn.functional.pad(wav, (0, 4000))
    alone = fbank(wav)
    n_frames = torch.tensor([alone.shape[1]])
    assert n_frames.item() == 1 + wav.shape[1] // HOP
    with padding_invariant(fbank, torch.nn.Identity(), n_frames):
        found = fbank(filled)
    torch.testing.assert_close(found[:, :50], alone)
    assert (fbank(filled)[:, :50] - alone).abs().max() > 1


def test_modules_are_as_they_were_after_an_error():
    encoder = ECAPA_TDNN(80, channels=[16] * 5)
    fbank = Fbank(n_mels=80)
    wav = torch.randn(2, RATE)
    encoder.eval()
    before = encoder(fbank(wav))
    with pytest.raises(RuntimeError, match="stop"):
        with padding_invariant(fbank, encoder, torch.tensor([30, 101])):
            raise RuntimeError("stop")
    assert torch.equal(encoder(fbank(wav)), before)
    assert reflected_frames(encoder) == 4


@pytest.mark.parametrize("channels", [16, 128])
def test_ecapa_embeds_padded_utterances_as_lone_ones(channels):
    torch.manual_seed(0)
    encoder = ECAPA_TDNN(80, channels=[channels] * 4 + [3 * channels])
    fbank = Fbank(n_mels=80)
    norm = InputNormalization(norm_type="sentence", std_norm=False)

    def embed(wavs, lengths):
        return encoder(norm(fbank(wavs), lengths), lengths)[:, 0]

    with torch.no_grad():
        for _ in range(10):  # statistics unlike the initial ones
            embed(torch.randn(8, RATE) * torch.rand(8, 1), torch.ones(8))
        encoder.eval()
        # From the fewest frames that SpeechBrain takes to 4 s.
        lengths = [4 * HOP, 5 * HOP - 1, 5 * HOP]
        lengths += np.random.default_rng(0).integers(4800, 64000, 9).tolist()
        wavs = [torch.randn(n) * (0.5 + torch.rand(n)) for n in lengths]
        with pytest.raises(RuntimeError, match="[Pp]adding size"):
            embed(wavs[0][None, :-1], torch.ones(1))
        alone = torch.cat([embed(wav[None], torch.ones(1)) for wav in wavs])
        filled = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True)
        n_frames = 1 + torch.tensor(lengths) // HOP
        with padding_invariant(fbank, encoder, n_frames):
            total = 1 + filled.shape[1] // HOP
            together = embed(filled, relative_lengths(n_frames, total))
        padded = embed(filled, torch.tensor(lengths) / filled.shape[1])
    cosine = torch.cosine_similarity(together.double(), alone.double())
    assert cosine.min() > 1 - 1e-9
    # What it is that SpeechBrain's padding moves.
    assert torch.cosine_similarity(padded, alone).min() < 0.99


# Lean pooling


def pooling(training):
    torch.manual_seed(0)
    pool = AttentiveStatisticsPooling(12, attention_channels=5).double()
    for _ in range(5):  # statistics unlike the initial ones
        pool(torch.randn(8, 12, 30).double() * 3 + 1)
    return pool.train(training)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("lengths", [None, LENGTHS.double()])
def test_values_and_gradients_are_speechbrains(training, lengths):
    found = []
    for lean in (False, True):
        pool = pooling(training)
        x = torch.randn(3, 12, 40, dtype=torch.float64).requires_grad_()
        weight = torch.randn(3, 24, 1, dtype=torch.float64)
        if lean:
            with lean_pooling(pool):
                value = pool(x, lengths)
        else:
            value = pool(x, lengths)
        (value * weight).sum().backward()
        gradients = [parameter.grad for parameter in pool.parameters()]
        found.append([value, x.grad, *gradients, *pool.buffers()])
    for expected, value in zip(*found):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)


def test_ecapa_has_the_attention_product_over_a_third_of_the_channels():
    encoder = ECAPA_TDNN(80, channels=[16] * 4 + [48]).eval()
    x = torch.randn(3, 120, 80)
    widths = []

    def spy(module, args, output):
        widths.append(args[0].shape[1])

    encoder.asp.tdnn.conv.register_forward_hook(spy)
    with torch.no_grad():
        expected = encoder(x, LENGTHS)
        with lean_pooling(encoder):
            found = encoder(x, LENGTHS)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert widths == [3 * 48]  # SpeechBrain's alone
        encoder(x, LENGTHS)  # as it was
    assert len(widths) == 2


def test_pooling_without_context_is_left_alone():
    pool = AttentiveStatisticsPooling(12, global_context=False)
    with lean_pooling(pool):
        assert "forward" not in vars(pool)
    with pytest.raises(RuntimeError, match="stop"):
        pool = AttentiveStatisticsPooling(12)
        with lean_pooling(pool):
            raise RuntimeError("stop")
    assert "forward" not in vars(pool)


def test_one_context_within_another():
    """Scoring within a fit: the outer one stays in force, and ends."""
    pool = AttentiveStatisticsPooling(4)
    with lean_pooling(pool):
        lean = pool.forward
        with lean_pooling(pool):
            pass
        assert pool.forward == lean
    assert "forward" not in vars(pool)
