"""Objectives of pre-training against slow references in float64."""

import math

import numpy as np
import pytest
import torch
from speechbrain.nnet.quantisers import RandomProjectionQuantizer

from lgl_plugin.nnet.masked_prediction import (
    ContrastivePrediction,
    MaskedPrediction,
    contrastive_loss,
    mix_utterances,
    span_mask,
)


def test_span_mask_masks_each_frame_as_often():
    torch.manual_seed(0)
    mask = span_mask(20_000, 30, share=0.4, length=4)
    torch.testing.assert_close(
        mask.double().mean(0),
        torch.full((30,), 0.4).double(),
        atol=0.02,
        rtol=0,
    )
    # Runs that begin and end within are spans, or spans that overlap.
    edges = torch.nn.functional.pad(mask[:2000].int(), (1, 1)).diff()
    starts, ends = ((edges == sign).nonzero() for sign in (1, -1))
    inside = (starts[:, 1] > 0) & (ends[:, 1] < 30)
    assert (ends - starts)[inside, 1].min() == 4


@pytest.mark.parametrize("share, length", [(0, 4), (1, 4), (0.5, 0), (0.5, 9)])
def test_span_mask_refuses(share, length):
    with pytest.raises(ValueError, match="must be in"):
        span_mask(2, 8, share, length)


def test_mixing_adds_the_power_of_another_utterance():
    torch.manual_seed(0)
    log_mels = torch.randn(6, 40, 8, dtype=torch.float64)
    torch.testing.assert_close(mix_utterances(log_mels, 0.0), log_mels)
    mixed = mix_utterances(log_mels, 1.0)
    added = mixed.exp() - log_mels.exp()
    powers = log_mels.exp()
    shifts = set()
    for row in range(6):
        frames = (added[row] > 1e-9).all(1).nonzero()[:, 0]
        assert 1 <= len(frames) <= 20
        assert frames[-1] - frames[0] == len(frames) - 1  # in one piece
        ratios = [added[row, frames] / powers[n, frames] for n in range(6)]
        (other,) = (n for n in range(6) if ratios[n].std() < 1e-6)
        shifts.add((row - other) % 6)
        gain = ratios[other].mean() * powers[other].sum() / powers[row].sum()
        assert abs(10 * math.log10(gain)) <= 5 + 1e-6
    assert len(shifts) == 1 and shifts != {0}


def test_masked_prediction_counts_masked_frames_alone():
    torch.manual_seed(0)
    objective = MaskedPrediction(
        8, lambda: RandomProjectionQuantizer(12, 4, 10)
    ).double()
    hidden = torch.randn(3, 9, 8, dtype=torch.float64)
    frames = torch.randn(3, 9, 12, dtype=torch.float64)
    mask = span_mask(3, 9, 0.5, 2)
    loss, figures = objective(hidden, frames, mask)
    projected = (frames @ objective.quantiser.P).numpy()
    losses, right, codes = [], [], []
    for row in range(3):
        for t in range(9):
            unit = projected[row, t] / np.linalg.norm(projected[row, t])
            gaps = np.linalg.norm(objective.quantiser.CB.numpy() - unit, axis=1)
            codes.append(gaps.argmin())
            if mask[row, t]:
                logits = objective.predict(hidden[row, t]).detach().numpy()
                shares = np.exp(logits) / np.exp(logits).sum()
                losses.append(-np.log(shares[codes[-1]]))
                right.append(logits.argmax() == codes[-1])
    # The loss is in float32, under autocast too.
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-5)
    assert figures["accuracy"].item() == pytest.approx(np.mean(right))
    shares = np.bincount(codes) / 27
    entropy = -(shares[shares > 0] * np.log(shares[shares > 0])).sum()
    assert figures["codes"].item() == pytest.approx(np.exp(entropy), rel=1e-5)


def test_contrastive_loss():
    """Frames of the same code are no negatives, nor are those not masked."""
    torch.manual_seed(0)
    predicted = torch.randn(2, 7, 5, dtype=torch.float64)
    targets = torch.randn(2, 7, 5, dtype=torch.float64)
    targets[0, 3] = targets[0, 1]
    mask = torch.tensor([[1, 1, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]]) > 0
    losses, right = [], []
    for row in range(2):
        rows = mask[row].nonzero()[:, 0].tolist()
        for t in rows:
            others = [
                n for n in rows if not targets[row, n].equal(targets[row, t])
            ]
            cosines = torch.cosine_similarity(
                predicted[row, t], targets[row, [t, *others]], dim=1
            )
            losses.append(-torch.log_softmax(cosines / 0.2, 0)[0].item())
            right.append(cosines.argmax().item() == 0)
    loss, accuracy = contrastive_loss(predicted, targets, mask, 0.2)
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-5)
    assert accuracy.item() == pytest.approx(np.mean(right))
    # In bfloat16 no cosine of a frame with itself would reach 1.
    with torch.autocast("cpu", torch.bfloat16):
        again, _ = contrastive_loss(predicted, targets, mask, 0.2)
    assert again.item() == pytest.approx(loss.item(), rel=1e-6)


def test_contrastive_prediction_trains_its_quantiser():
    torch.manual_seed(0)
    objective = ContrastivePrediction(8, 12, size=16, n_codes=4)
    loss, figures = objective(
        torch.randn(3, 20, 8), torch.randn(3, 20, 12), span_mask(3, 20, 0.5, 4)
    )
    loss.backward()
    assert objective.quantiser.quantiser.weight_proj.weight.grad.abs().sum() > 0
    assert 2 <= figures["codes"] <= 8
