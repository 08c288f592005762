"""The lean pooling against SpeechBrain's."""

import pytest
import torch
from speechbrain.lobes.models.ECAPA_TDNN import (
    ECAPA_TDNN,
    AttentiveStatisticsPooling,
)

from lgl_plugin.nnet.ecapa_patches import lean_pooling

LENGTHS = torch.tensor([0.31, 1.0, 0.77])


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
