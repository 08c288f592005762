"""Each method of Stage I by what sets it apart, on a tiny encoder."""

import math
import pathlib
import re

import numpy as np
import pytest
import speechbrain as sb
import torch
from tiny_brains import (
    BATCH,
    DIM,
    METHODS,
    TIME,
    batch,
    begin,
    changed,
    make_brain,
    run_epoch,
    tiny_encoder,
    train,
    warnings_of,
    weights,
)

from lgl_plugin.methods.dino import DINO
from lgl_plugin.methods.method import Method, local_views
from lgl_plugin.methods.moco import MoCo
from lgl_plugin.methods.sdpn import SDPN
from lgl_plugin.methods.simclr import SimCLR
from lgl_plugin.nnet.distillation import koleo
from lgl_plugin.nnet.momentum import MomentumCopy
from lgl_plugin.nnet.redundancy import spread_terms
from lgl_plugin.training.nonfinite import clip_each

ROOT = pathlib.Path(__file__).parents[2]
WITH_TEACHER = ("moco", "dino", "rdino", "sdpn")


class Loud(torch.nn.Module):
    """In the place of augmentation: each call is told by its loudness."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, wavs, draw=None):
        self.calls += 1
        return 10**self.calls * wavs


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


class Followed(Method):
    """A teacher by no more than CONTRIBUTING.md asks for."""

    def __init__(self, encoder, embedding_size, n_utterances):
        super().__init__()
        self.teacher, self.teacher_momentum = MomentumCopy(encoder), 0.5
        self.scale = torch.nn.Parameter(torch.ones(embedding_size))

    def views(self, crops, augment):
        views, _ = super().views(crops, augment)
        return views, views

    def separate_parameters(self):
        return [self.scale]

    def forward(self, embeddings, teacher_embeddings, groups, done):
        far = embeddings[0][0] * self.scale - teacher_embeddings[0][1]
        return far.square().mean(), {"far": far.detach().abs().mean()}


def test_a_method_by_the_guide_trains(tmp_path, monkeypatch):
    """The guide asked for the method `momentum` in place of the number."""
    monkeypatch.setitem(METHODS, "simclr", Followed)
    brain = begin(make_brain("simclr", tmp_path))
    brain.steps_per_epoch = 8  # at the end the teacher stays
    before = weights(brain)
    train(brain, *4 * [False])
    assert {"encoder", "method"} <= changed(brain, before)
    method = brain.method
    follows = zip(method.teacher.parameters(), before["encoder"], strict=True)
    assert not any(new.equal(old) for new, old in follows)
    run_epoch(brain, 1, batch(2))
    guide = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    assert "Give `teacher_momentum`" in guide
    said = re.search(r"a run's own, such as (.*?):", guide, re.S)[1]
    names = re.findall(r"`(\w+)`", said)
    assert names and brain.records[0].keys() - {"far"} >= {*names}


@pytest.fixture(params=METHODS)
def brain(request, tmp_path):
    return begin(make_brain(request.param, tmp_path))


def test_it_learns_a_batch_by_heart(brain):
    brain.hparams.lr_annealing = sb.nnet.schedulers.StepScheduler(0.003, 1.0)
    brain.steps_per_epoch, losses = 80, []
    for brain.step in range(80):
        losses.append(float(brain.fit_batch(batch(2))))
    assert np.isfinite(losses).all()
    # From the tenth step on: MoCo's first losses lack negatives.
    assert np.mean(losses[-10:]) < np.mean(losses[10:20])


def test_its_figures_are_logged(brain):
    run_epoch(brain, 1, batch(2))
    figures = brain.epoch_summary()
    assert all(math.isfinite(value) for value in figures.values())
    assert brain.records[0].items() >= figures.items()


def test_the_encoder_learns_and_the_teacher_follows(brain):
    brain.fit_batch(batch(2))  # MoCo has no negatives in the first step
    before = [p.clone() for p in brain.modules.encoder.parameters()]
    teacher = brain.method.teacher
    taught = [p.clone() for p in teacher.parameters()] if teacher else []
    brain.fit_batch(batch(2))
    now = list(brain.modules.encoder.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, now))
    assert (teacher is not None) == (brain.method.name in WITH_TEACHER)
    if teacher is not None:
        keeps = brain.method.momentum(brain.done)
        for old, new, mine in zip(taught, now, teacher.parameters()):
            expected = keeps * old + (1 - keeps) * new
            torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("kind", WITH_TEACHER)
def test_no_gradient_reaches_a_teacher(kind, tmp_path):
    brain = begin(make_brain(kind, tmp_path))
    outputs = brain.compute_forward(batch(2), sb.Stage.TRAIN)
    assert not any(group.requires_grad for group in outputs[1])
    brain.compute_objectives(outputs, batch(2), sb.Stage.TRAIN).backward()
    named = brain.method.named_parameters()
    without = {name for name, p in named if p.grad is None}
    assert {name.split(".")[0] for name in without} == {
        name
        for name in ("teacher", "teacher_head", "teacher_prototypes")
        if hasattr(brain.method, name)
    }


def test_local_views_are_halves_of_both_crops_in_turn():
    crops = torch.arange(2.0 * 2 * 40).reshape(2, 2, 40)
    views = local_views(crops, 4, torch.nn.Identity())
    assert views.shape == (4, 2, 20)
    for number, view in enumerate(views):
        for utterance, cut in enumerate(view):
            first = int(cut[0])
            assert cut.tolist() == list(range(first, first + 20))
            whole = crops[utterance, number % 2]
            assert whole[0] <= cut[0] and cut[-1] <= whole[-1]
    starts = local_views(crops, 50, torch.nn.Identity())[::2, 0, 0]
    assert len(starts.unique()) > 10


def test_dinos_teacher_sees_the_global_views_of_the_student():
    method, augment = METHODS["dino"](tiny_encoder(), DIM, BATCH), Loud()
    crops = batch(2).sig.data
    (global_, local), taught = method.views(crops, augment)
    assert len(taught) == 1 and taught[0] is global_
    assert torch.equal(global_[0], 10 * crops[:, 0])
    assert torch.equal(global_[1], 100 * crops[:, 1])
    assert local.shape == (4, BATCH, TIME // 2) and augment.calls == 6


def test_sdpns_teacher_sees_one_clean_view_that_the_student_does_not():
    method, augment = METHODS["sdpn"](tiny_encoder(), DIM, BATCH), Loud()
    crops = batch(2).sig.data
    (local,), (taught,) = method.views(crops, augment)
    assert torch.equal(taught[0], crops[:, 0])
    assert local.shape == (4, BATCH, TIME // 2) and augment.calls == 4


def test_dinos_targets_are_centred_and_sharpened():
    method = METHODS["dino"](
        tiny_encoder(), DIM, BATCH, teacher_temperatures=[0.04, 0.07]
    )
    embeddings = torch.randn(2, BATCH, DIM)
    method.centre.copy_(torch.randn(len(method.centre)))
    method.eval()
    logits = method.teacher_prototypes(method.teacher_head(embeddings))
    for done, temperature in ((0.0, 0.04), (0.1, 0.055), (0.5, 0.07)):
        before = method.centre.clone()
        found = method.teacher_probabilities(embeddings, done)
        expected = ((logits - before) / temperature).softmax(-1)
        torch.testing.assert_close(found, expected)
        moved = 0.9 * before + 0.1 * logits.mean((0, 1))
        torch.testing.assert_close(method.centre, moved)


def test_dinos_prototypes_rest_at_first(tmp_path):
    brain = begin(make_brain("dino", tmp_path))
    start = brain.method.prototypes.weight.clone()
    brain.steps_per_epoch, brain.epochs_in_all = 1000, 1
    brain.fit_batch(batch(2))
    assert torch.equal(brain.method.prototypes.weight, start)
    brain.step = 500
    brain.fit_batch(batch(2))
    assert not torch.equal(brain.method.prototypes.weight, start)


@pytest.mark.parametrize("limit", [0.1, 3.0])
def test_gradients_are_clipped_one_by_one_as_torch_does(limit):
    shapes = (3, 4), (5,), (), (2, 1, 7)
    gradients = [4 * torch.randn(shape) for shape in shapes]
    expected = [gradient.clone() for gradient in gradients]
    for gradient in expected:
        parameter = torch.nn.Parameter(torch.zeros_like(gradient))
        parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(parameter, limit)
    clip_each(gradients, limit)
    for found, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_sdpns_prototypes_are_neither_clipped_nor_decayed(tmp_path):
    brain = begin(make_brain("sdpn", tmp_path, run_opts={"max_grad_norm": 1e9}))
    brain.method.clip_each, seen = 1e-3, {}

    def note(optimizer, *_):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                norm = parameter.grad.norm().item()
                prototypes = parameter is brain.method.prototypes.weight
                seen.setdefault(prototypes, []).append(norm)

    brain.optimizer.register_step_pre_hook(note)
    brain.fit_batch(batch(2))
    assert max(seen[False]) == pytest.approx(1e-3, rel=1e-3)
    assert seen[True][0] > 2e-3
    *_, group = brain.optimizer.param_groups
    (parameter,) = group["params"]
    assert parameter is brain.method.prototypes.weight
    assert group["weight_decay"] == 0


def test_an_utterance_twice_in_a_batch_is_no_negative_of_itself():
    """As where a pass over a small corpus ends within the batch."""
    method = SimCLR(None, 8, 10, adversarial_weight=0.0)
    views = torch.stack([torch.eye(4, 8), torch.eye(4, 8)])
    views[:, 1] = views[:, 0]
    groups = torch.tensor([[3, 3, 5, 6]] * 2)
    loss, _ = method([views], [], groups, 0.0)
    # Two utterances less than where all four are others: 4 negatives, not 6.
    twice = float(loss)
    expected = math.log1p(4 * math.exp(-10))
    alone = math.log1p(6 * math.exp(-10))
    assert twice == pytest.approx((2 * expected + 2 * alone) / 4, rel=1e-3)
    same, _ = method([views], [], torch.arange(4).expand(2, -1), 0.0)
    assert float(same) > twice + 0.1


def test_mocos_negatives_are_of_others():
    method = MoCo(tiny_encoder(), DIM, BATCH, queue_size=100)
    assert len(method.queue.groups) == BATCH  # the corpus's size
    embeddings, keys = torch.randn(2, 2, 3, DIM)
    held = torch.randn(4, DIM)
    method.queue.add(torch.tensor([0, 5, 2, 7]), held)
    # The first utterance's second crop is of another one.
    groups = torch.tensor([[0, 1, 2], [5, 1, 2]])
    anchors = torch.nn.functional.normalize(embeddings, dim=-1)
    others = torch.nn.functional.normalize(keys, dim=-1).flip(0)
    losses = []
    for view in range(2):
        for row in range(3):
            cosines = [float(anchors[view, row] @ others[view, row])] + [
                float(anchors[view, row] @ vector)
                for owner, vector in zip([0, 5, 2, 7], held)
                if owner not in groups[:, row]
            ]
            powers = np.exp(np.array(cosines) / 0.07)
            losses.append(-np.log(powers[0] / powers.sum()))
    loss, _ = method([embeddings], [keys], groups, 0.0)
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-4)
    assert method.queue.groups.tolist() == [2, 5, 2, 7, 5, 1]


def test_sdpns_loss_is_the_sum_of_its_parts():
    weights = {"mean_entropy": 0.5, "koleo": 0.2, "dimension": 0.3}
    weights["off_diagonal"] = 0.4
    embeddings, taught = torch.randn(4, BATCH, DIM), torch.randn(1, BATCH, DIM)
    groups = torch.arange(BATCH).expand(2, -1)

    def loss(**given):
        torch.manual_seed(2)
        given = {**dict.fromkeys(weights, 0.0), "n_prototypes": 5, **given}
        method = SDPN(tiny_encoder(), DIM, BATCH, hidden_size=16, **given)
        value, figures = method([embeddings], [taught], groups, 0.0)
        return value.item(), figures

    bare, _ = loss()
    whole, figures = loss(**weights)
    added = sum(w * figures[name].item() for name, w in weights.items())
    assert whole == pytest.approx(bare + added, rel=1e-5)
    each = [koleo(view).item() for view in embeddings]
    assert figures["koleo"].item() == pytest.approx(sum(each), rel=1e-5)


@pytest.mark.parametrize(
    "batch_size, queue_size, warned",
    [(64, 0, True), (64, 300, False), (384, 0, False)],
)
def test_a_batch_for_far_more_prototypes_is_warned_of(
    batch_size, queue_size, warned, caplog
):
    small = {"hidden_size": 8, "bottleneck_size": 4, "queue_size": queue_size}
    method = SDPN(tiny_encoder(), DIM, BATCH, n_prototypes=1024, **small)
    method.check_batch(batch_size)
    said = "a step can use only 64 of 1024 prototypes"
    assert (said in caplog.text) == warned


def test_sdpns_prototypes_have_a_learning_rate_of_their_own(tmp_path):
    small = {"hidden_size": 8, "bottleneck_size": 4, "n_prototypes": 6}
    encoder = tiny_encoder()
    method = SDPN(encoder, DIM, BATCH, prototype_lr=4.0, **small)
    modules = {"encoder": encoder, "method": method}
    brain = begin(make_brain("sdpn", tmp_path, modules))
    brain.fit_batch(batch(2))
    rates = {
        id(parameter): group["lr"]
        for group in brain.optimizer.param_groups
        for parameter in group["params"]
    }
    own = rates.pop(id(method.prototypes.weight))
    assert {*rates.values()} == {own / 4}


def spoil(method, how):
    """Makes the teacher collapse in one of its two ways."""
    if how == "it finds all prototypes alike":
        method.teacher_temperatures = (1e3, 1e3)
        method.temperature = 1e4
    else:  # one prototype is near to all, the others far
        head = method.teacher_head.copy[-1]
        weight = method.prototypes.weight
        if method.name == "dino":
            weight = method.teacher_prototypes.copy.weight
        with torch.no_grad():
            head.weight.zero_()
            head.bias.fill_(1.0)
            weight.fill_(-1.0)
            weight[0] = 1.0


@pytest.mark.parametrize(
    "how", ["it finds all prototypes alike", "it gives nearly all utterances"]
)
@pytest.mark.parametrize("kind", ["dino", "sdpn"])
def test_a_collapsed_teacher_is_named_after_an_epoch(kind, how, tmp_path):
    brain = make_brain(kind, tmp_path)
    run_epoch(begin(brain), 1, batch(2, seed=9))
    spoil(brain.method, how)
    run_epoch(brain, 2, batch(2, seed=9))
    said = [w for w in warnings_of(brain).splitlines() if "teacher" in w]
    (warning,) = said
    assert f"epoch 2: the teacher has collapsed: {how}" in warning


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DINO(tiny_encoder(), DIM, 9, temperature=0), "temperature"),
        (lambda: SDPN(tiny_encoder(), DIM, 9, n_local=0), "n_local must be"),
        (lambda: SDPN(tiny_encoder(), DIM, 9, temperature=-1), "temperature"),
        (lambda: MoCo(tiny_encoder(), DIM, 9, temperature=0), "temperature"),
        (lambda: MoCo(tiny_encoder(), DIM, 9, queue_size=0), "queue_size"),
        (lambda: DINO(tiny_encoder(), DIM, 9, n_local=-1), "n_local"),
        (
            lambda: DINO(tiny_encoder(), DIM, 9, teacher_temperatures=[0.04]),
            "teacher_temperatures must be two",
        ),
        (lambda: DINO(tiny_encoder(), DIM, 9, n_prototypes=1), "n_prototypes"),
        (
            lambda: DINO(tiny_encoder(), DIM, 9, teacher_momentum=1.0),
            "teacher_momentum must be in",
        ),
        (lambda: SDPN(tiny_encoder(), DIM, 9, clip_each=0.0), "clip_each"),
        (lambda: SDPN(tiny_encoder(), DIM, 9, queue_size=-1), "queue_size"),
        (
            lambda: METHODS["vicreg"](tiny_encoder(), DIM, 9, variance=-1.0),
            "variance",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_views_are_augmented_each_by_itself():
    """As babble of one batch would be of the other crop of its utterance."""
    method = METHODS["vicreg"](tiny_encoder(), DIM, BATCH)
    crops, augment = batch(2).sig.data, Loud()
    (views,), taught = method.views(crops, augment)
    assert torch.equal(views[0], 10 * crops[:, 0])
    assert torch.equal(views[1], 100 * crops[:, 1]) and not taught


@pytest.mark.parametrize("done", [0.0, 0.07, 0.5])
def test_rdinos_regularisation_rises_and_is_of_the_mean_global_view(done):
    embeddings, taught = torch.randn(2, BATCH, DIM), torch.randn(2, BATCH, DIM)
    losses = []
    for weight in (0.0, 0.2):
        torch.manual_seed(2)
        method = DINO(
            tiny_encoder(), DIM, BATCH, n_prototypes=6, regularisation=weight
        )
        groups = torch.arange(BATCH).expand(2, -1)
        loss, _ = method([embeddings], [taught], groups, done)
        losses.append(loss.item())
    variance, covariance = spread_terms(embeddings.mean(0))
    share = min(0.25 + 0.75 * 7 * done, 1)
    expected = 0.2 * share * (5 * variance + covariance * DIM / 6)
    assert losses[1] - losses[0] == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", METHODS)
def test_a_step_under_autocast(kind, precision, tmp_path):
    options = {"precision": precision}
    brain = begin(make_brain(kind, tmp_path, run_opts=options))
    for _ in range(2):
        loss = brain.fit_batch(batch(2))
        assert loss.dtype == torch.float32 and loss.isfinite()
    assert brain.skipped == 0
