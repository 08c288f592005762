"""Held-out utterances: two views each, alike at every epoch, measured."""

import math

import numpy as np
import pytest
import torch
from speechbrain.nnet.schedulers import StepScheduler
from tiny_brains import (
    BATCH,
    BRAINS,
    DIM,
    add_batch_norm,
    batch,
    run_epoch,
    tiny_encoder,
    warnings_of,
)

from lgl_plugin.inference.calibration import pairs_eer
from lgl_plugin.nnet.augment import Augmenter
from lgl_plugin.training.held_out import (
    HeldOut,
    contrastive_accuracy,
    geometry,
    separate_generator,
)

KINDS = pytest.mark.parametrize("kind", list(BRAINS))
COLLAPSED = "the embeddings have collapsed: "


@pytest.fixture
def encoder():
    return tiny_encoder().eval()


# By itself


@torch.no_grad()
def test_embeddings_repeat_and_leave_the_generator(encoder):
    augment, held_out = Augmenter().eval(), HeldOut()
    crops = batch(2).sig.data
    torch.manual_seed(123)
    expected = torch.randn(3)
    torch.manual_seed(123)
    held_out.embed(encoder, augment, crops, seed=1)
    assert torch.equal(torch.randn(3), expected)
    held_out.embed(encoder, augment, crops, seed=1)  # an epoch on
    held_out.embed(encoder, augment, crops, seed=2)
    first, again, other = held_out.batches
    assert torch.equal(again, first)
    assert not torch.equal(other, first)
    assert first.shape == (2, BATCH, DIM)


@torch.no_grad()
def test_crops_are_in_their_utterances_place(encoder):
    """Embedding [v, i] is that of crop v of utterance i."""
    crops, held_out = batch(2).sig.data, HeldOut()
    held_out.embed(encoder, torch.nn.Identity(), crops, seed=1)
    (found,) = held_out.batches
    for view in (0, 1):
        torch.testing.assert_close(found[view], encoder(crops[:, view]))


@torch.no_grad()
def test_a_view_is_augmented_by_itself(encoder):
    """Babble is made of the other utterances of what is given."""
    crops, seen = batch(2).sig.data, []

    def augment(wavs):
        seen.append(wavs)
        return wavs

    HeldOut().embed(encoder, augment, crops, seed=1)
    assert [torch.equal(seen[v], crops[:, v]) for v in (0, 1)] == [True, True]
    assert len(seen) == 2


@torch.no_grad()
def test_figures_are_of_all_batches_and_then_forgotten(encoder):
    held_out, plain = HeldOut(), torch.nn.Identity()
    for seed in (1, 2, 3):
        held_out.embed(encoder, plain, batch(2, seed).sig.data, seed=1)
    first, second = torch.cat(held_out.batches, dim=1).numpy()
    assert first.shape == (3 * BATCH, DIM)
    assert held_out.measure(1) == {
        **geometry(first, second),
        "pseudo_eer": 100 * pairs_eer(first, second)[0],
        "contrastive_accuracy": contrastive_accuracy(first, second),
    }
    assert held_out.batches == []


@torch.no_grad()
def test_figures_that_are_not_finite_are_an_error(encoder):
    crops, held_out = batch(2).sig.data, HeldOut()
    crops[3, 1, 5] = math.nan
    held_out.embed(encoder, torch.nn.Identity(), crops, seed=1)
    with pytest.raises(ValueError, match="After epoch 4 .* --eval_precision"):
        held_out.measure(4)
    assert held_out.batches == []


def test_a_separate_generator_changes_nothing():
    state = torch.get_rng_state()
    with separate_generator("cpu"):
        torch.manual_seed(5)
        torch.rand(9)
    assert torch.equal(torch.get_rng_state(), state)


# In a Brain


@KINDS
def test_every_epoch_measures_the_same_crops(kind, make):
    """Whatever training drew in between; an encoder at rest shows it."""
    brain = make(kind)
    brain.hparams.lr_annealing = StepScheduler(0.0)
    brain.epoch = 1
    for number in (1, 2):
        run_epoch(brain, number, batch(2, seed=9))
        torch.rand(number)
    names = ("mean_cosine", "pseudo_eer", "contrastive_accuracy")
    first, second = ([r[name] for name in names] for r in brain.records)
    assert first == second
    assert np.isfinite(first).all()


@KINDS
def test_an_encoder_that_says_the_same_of_all(kind, make):
    brain = make(kind)
    layer = brain.modules.encoder.network.utterance
    layer.weight.data.zero_()
    layer.weight.requires_grad_(False)
    run_epoch(brain, 1, batch(2, seed=9))
    assert brain.record["mean_cosine"] == pytest.approx(1, abs=1e-6)
    assert brain.record["effective_dimensions"] == 0
    assert f"{COLLAPSED}different held-out utterances" in warnings_of(brain)


def test_an_encoder_of_one_dimension(gated):
    brain = gated()
    # So that tiny features show, by the statistics of the last step.
    add_batch_norm(brain).momentum = 1.0
    layer = brain.modules.encoder.network.utterance
    layer.weight.data[1:] = layer.weight.data[:1]
    layer.weight.requires_grad_(False)
    run_epoch(brain, 1, batch(2, seed=9))
    assert brain.record["mean_cosine"] < 0.99
    assert 1 <= brain.record["effective_dimensions"] < 1.5
    assert f"{COLLAPSED}they vary in 1." in warnings_of(brain)


def test_an_encoder_that_spreads_has_not_collapsed(gated):
    brain = gated()
    add_batch_norm(brain).momentum = 1.0
    run_epoch(brain, 1, batch(2, seed=9))
    assert brain.record["effective_dimensions"] > 2
    assert COLLAPSED not in warnings_of(brain)


def test_an_encoder_that_fails_in_evaluation_alone(gated):
    brain = gated()
    add_batch_norm(brain).running_var[:] = math.nan  # as loaded
    with pytest.raises(ValueError, match="not finite, though .* --eval_prec"):
        run_epoch(brain, 1, batch(2, seed=9))
