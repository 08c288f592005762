"""Stage I's Brain: contrastive and adversarial, on a tiny encoder."""

import copy
import math

import numpy as np
import pytest
import speechbrain as sb
import torch
from speechbrain.nnet.schedulers import StepScheduler
from tiny_brains import (
    BATCH,
    DIM,
    TIME,
    batch,
    begin,
    make_brain,
    run_epoch,
    tiny_encoder,
    train,
    warnings_of,
    weights,
)

from lgl_plugin.methods.simclr import SimCLR
from lgl_plugin.methods.stage1 import Stage1Brain
from lgl_plugin.nnet.augment import Augmenter


@pytest.fixture
def simclr(tmp_path):
    torch.manual_seed(1)
    return begin(make_brain("simclr", tmp_path))


def adversarial_pairs(first, second, third):
    """Pairs that share their augmentation, then pairs that do not."""
    pairs = [torch.cat([first, second], 1), torch.cat([first, third], 1)]
    return torch.cat(pairs), torch.tensor([1] * BATCH + [0] * BATCH)


def test_the_adversarys_step_changes_the_adversary_alone(simclr):
    encoder = weights(simclr)["encoder"]
    scale = simclr.method.contrastive.raw_scale.clone()
    adversary = copy.deepcopy(list(simclr.method.adversary.parameters()))
    embeddings, _ = simclr.compute_forward(batch(2), sb.Stage.TRAIN)
    simclr.train_adversary([group.detach() for group in embeddings])
    pairs = zip(simclr.modules.encoder.parameters(), encoder)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(p.grad is None for p in simclr.modules.encoder.parameters())
    assert torch.equal(simclr.method.contrastive.raw_scale, scale)
    pairs = zip(simclr.method.adversary.parameters(), adversary)
    assert not any(torch.equal(a, b) for a, b in pairs)


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


def test_main_step_leaves_the_adversary(simclr, monkeypatch):
    monkeypatch.setattr(simclr, "train_adversary", lambda embeddings: None)
    before = copy.deepcopy(list(simclr.method.adversary.parameters()))
    scale = simclr.method.contrastive.raw_scale.clone()
    simclr.fit_batch(batch(2))
    pairs = zip(simclr.method.adversary.parameters(), before)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(simclr.method.contrastive.raw_scale, scale)


def test_adversary_learns_from_its_own_gradient_alone(simclr, monkeypatch):
    """The adversarial pass's gradients are cleared before the next step."""
    seen = []
    optimizer = simclr.optimizers_dict["adversary"]
    step = optimizer.step

    def spy():
        parameters = list(simclr.method.adversary.parameters())
        seen.append([p.grad.clone() for p in parameters])
        expected = torch.autograd.grad(spy.loss(), parameters)
        for grad, other in zip(seen[-1], expected):
            torch.testing.assert_close(grad, other)
        step()

    def own(embeddings):
        pairs, target = adversarial_pairs(*embeddings[0])
        spy.loss = lambda: torch.nn.functional.cross_entropy(
            simclr.method.adversary(pairs), target
        )
        Stage1Brain.train_adversary(simclr, embeddings)

    monkeypatch.setattr(optimizer, "step", spy)
    monkeypatch.setattr(simclr, "train_adversary", own)
    for number in range(3):
        simclr.fit_batch(batch(2, number))
    assert len(seen) == 3


def test_encoder_gets_the_reversed_gradient_by_its_weight():
    """g(w) = contrastive - w * adversarial: linear in w, and against it."""
    torch.manual_seed(1)
    method = SimCLR(tiny_encoder(), DIM, BATCH)
    views = torch.randn(3, BATCH, DIM, requires_grad=True)
    gradients = {}
    for weight in (0.0, 1.0, 3.0):
        method.adversarial_weight = weight
        loss, _ = method([views], [], torch.arange(BATCH).expand(2, -1), 0.0)
        (gradients[weight],) = torch.autograd.grad(loss, views)
    pairs, target = adversarial_pairs(*views)
    loss = torch.nn.functional.cross_entropy(method.adversary(pairs), target)
    (plain,) = torch.autograd.grad(loss, views)
    for weight in (1.0, 3.0):
        difference = gradients[weight] - gradients[0.0]
        torch.testing.assert_close(difference, -weight * plain)
    assert plain.abs().max() > 1e-4


def test_without_an_adversary_there_are_two_views():
    method = SimCLR(tiny_encoder(), DIM, BATCH, adversarial_weight=0.0)
    (views,), taught = method.views(batch(2).sig.data, Augmenter())
    assert views.shape == (2, BATCH, TIME) and not taught
    assert method.adversary is None
    embeddings = torch.randn(2, BATCH, DIM)
    loss, figures = method(
        [embeddings], [], torch.arange(BATCH).expand(2, -1), 0.0
    )
    assert torch.equal(loss, method.contrastive(*embeddings)[0])
    assert list(figures) == ["accuracy"]


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match="adversarial_weight must be 0 or"):
        SimCLR(tiny_encoder(), DIM, BATCH, adversarial_weight=-1.0)


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


def test_figures_are_means_of_the_steps_that_have_any(simclr):
    """A loss that is finite has them, whatever its gradient."""
    seen = []
    simclr.modules.method.register_forward_hook(
        lambda method, given, found: seen.append(found[1]["accuracy"].item())
    )
    weight = simclr.modules.encoder.network.frame.weight
    train(simclr, False)
    overflow = weight.register_hook(lambda gradient: gradient * math.inf)
    train(simclr, False, False)
    overflow.remove()
    train(simclr, True)
    assert simclr.tally.counts["skipped"] == 3
    accuracy = simclr.epoch_summary()["accuracy"]
    assert accuracy == pytest.approx(np.mean(seen[:3])) and accuracy > 0


def test_a_discriminator_that_nobody_answers_is_warned_of(simclr, monkeypatch):
    """The augmentation is plain to see, and the encoder does not hide it."""
    simclr.method.adversarial_weight = 0.0
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
