"""Stage I's Brain: contrastive and adversarial, on a tiny encoder."""

import numpy as np
import pytest
import speechbrain as sb
import torch
from speechbrain.nnet.schedulers import StepScheduler
from tiny_brains import (
    BATCH,
    DIM,
    batch,
    begin,
    changed,
    make_brain,
    run_epoch,
    warnings_of,
    weights,
)

from lgl_plugin.methods.simclr import SimCLRBrain


@pytest.fixture
def simclr(tmp_path):
    torch.manual_seed(1)
    return begin(make_brain("simclr", tmp_path))


def adversarial_pairs(first, second, third):
    """Pairs that share their augmentation, then pairs that do not."""
    pairs = [torch.cat([first, second], 1), torch.cat([first, third], 1)]
    return torch.cat(pairs), torch.tensor([1] * BATCH + [0] * BATCH)


def test_discriminator_step_changes_only_the_discriminator(simclr):
    before = weights(simclr)
    embeddings = simclr.compute_forward(batch(2), sb.Stage.TRAIN)
    simclr.train_discriminator(embeddings.detach())
    assert changed(simclr, before) == {"discriminator"}
    assert all(p.grad is None for p in simclr.modules.encoder.parameters())


def test_vectors_without_weight_decay_on_request(tmp_path):
    options = {"remove_vector_weight_decay": True}
    plain = begin(make_brain("simclr", tmp_path / "plain"))
    brain = begin(make_brain("simclr", tmp_path / "own", run_opts=options))
    for name, optimizer in brain.optimizers_dict.items():
        vectors, others = optimizer.param_groups
        assert vectors["weight_decay"] == 0
        assert all(p.ndim == 1 for p in vectors["params"])
        assert all(p.ndim != 1 for p in others["params"])
        (whole,) = plain.optimizers_dict[name].param_groups
        both = len(vectors["params"]) + len(others["params"])
        assert both == len(whole["params"])


def test_main_step_leaves_the_discriminator(simclr, monkeypatch):
    monkeypatch.setattr(simclr, "train_discriminator", lambda embeddings: None)
    before = weights(simclr)
    simclr.fit_batch(batch(2))
    assert changed(simclr, before) == {"encoder", "contrastive"}


def test_discriminator_learns_from_its_own_gradient_alone(simclr, monkeypatch):
    """The adversarial pass's gradients are cleared before the next step."""
    seen = []
    optimizer = simclr.discriminator_optimizer
    step = optimizer.step

    def spy():
        parameters = list(simclr.modules.discriminator.parameters())
        seen.append([p.grad.clone() for p in parameters])
        expected = torch.autograd.grad(spy.loss(), parameters)
        for grad, other in zip(seen[-1], expected):
            torch.testing.assert_close(grad, other)
        step()

    def own(embeddings):
        pairs, target = adversarial_pairs(*embeddings)
        spy.loss = lambda: torch.nn.functional.cross_entropy(
            simclr.modules.discriminator(pairs), target
        )
        SimCLRBrain.train_discriminator(simclr, embeddings)

    monkeypatch.setattr(optimizer, "step", spy)
    monkeypatch.setattr(simclr, "train_discriminator", own)
    for number in range(3):
        simclr.fit_batch(batch(2, number))
    assert len(seen) == 3


def test_discriminators_of_all_processes_step_alike(simclr):
    """Its own step averages gradients over processes even where the encoder's
    gradients are still accumulated."""
    discriminator, seen = simclr.modules.discriminator, []
    # As DistributedDataParallel's `no_sync` leaves it.
    discriminator.require_backward_grad_sync = False
    discriminator.register_forward_pre_hook(
        lambda module, args: seen.append(module.require_backward_grad_sync)
    )
    embeddings = torch.randn(3, BATCH, DIM)
    simclr.train_discriminator(embeddings)
    assert seen and all(seen)
    assert discriminator.require_backward_grad_sync is False


def test_encoder_gets_the_reversed_gradient_by_its_weight(simclr, monkeypatch):
    """g(w) = contrastive - w * adversarial: linear in w, and against it."""
    monkeypatch.setattr(simclr, "train_discriminator", lambda embeddings: None)
    embeddings = torch.randn(3, BATCH, DIM, requires_grad=True)
    gradients = {}
    for weight in (0.0, 1.0, 3.0):
        simclr.hparams.adversarial_weight = weight
        loss = simclr.compute_objectives(embeddings, batch(2), sb.Stage.TRAIN)
        (gradients[weight],) = torch.autograd.grad(loss, embeddings)
    pairs, target = adversarial_pairs(*embeddings)
    logits = simclr.modules.discriminator(pairs)
    loss = torch.nn.functional.cross_entropy(logits, target)
    (plain,) = torch.autograd.grad(loss, embeddings)
    for weight in (1.0, 3.0):
        difference = gradients[weight] - gradients[0.0]
        torch.testing.assert_close(difference, -weight * plain)
    assert plain.abs().max() > 1e-4


def test_views_share_augmentations_as_the_paper_has_it(simclr, monkeypatch):
    """A(a), A(b), B(b): the draws and the crops that each view gets."""
    calls = []

    def augment(wavs, draw=None):
        calls.append((wavs, draw))
        return wavs

    monkeypatch.setattr(simclr.modules.augment, "forward", augment)
    given = batch(2)
    simclr.compute_forward(given, sb.Stage.TRAIN)
    (a, first), (b, second), (b_again, third) = calls
    assert torch.equal(a, given.sig.data[:, 0])
    assert torch.equal(b, given.sig.data[:, 1])
    assert torch.equal(b_again, b)
    assert first is second and first is not None and third is not first


def test_simclr_learns_a_batch_by_heart(simclr):
    losses = [float(simclr.fit_batch(batch(2))) for _ in range(60)]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    summary = simclr.epoch_summary()
    assert 0 <= summary["accuracy"] <= 1
    assert 0 <= summary["discriminator_accuracy"] <= 1


def test_a_discriminator_that_nobody_answers_is_warned_of(simclr, monkeypatch):
    """The augmentation is plain to see, and the encoder does not hide it."""
    simclr.hparams.adversarial_weight = 0.0
    simclr.hparams.lr_annealing = StepScheduler(0.01, 1.0)
    simclr.epoch = 1
    monkeypatch.setattr(simclr.modules.augment, "draw", lambda *shape: "shared")
    monkeypatch.setattr(
        simclr.modules.augment,
        "forward",
        lambda wavs, draw=None: wavs if draw else 0.01 * wavs,
    )
    for _ in range(40):
        simclr.fit_batch(batch(2))
    for number in (1, 2, 3):
        run_epoch(simclr, number, batch(2, seed=9))
    assert "the discriminator has won: 3 epochs" in warnings_of(simclr)
