"""Stage II's Brain: AAM-softmax through a gate, on a tiny encoder."""

import copy

import numpy as np
import pytest
import speechbrain as sb
import torch
from hypothesis import given, strategies as st
from speechbrain.nnet.losses import AdditiveAngularMargin, LogSoftmaxWrapper
from tiny_brains import (
    BATCH,
    CLASSES,
    DIM,
    batch,
    changed,
    run_epoch,
    warnings_of,
    weights,
)

from lgl_plugin.nnet.anchor import Anchor
from lgl_plugin.nnet.gates import FixedGate, Gate, LabelCorrection, NoGate
from lgl_plugin.nnet.given import GivenRows
from lgl_plugin.training.loss_gated import last_visits


class Among(Gate):
    """Selects the first of a batch."""

    def __init__(self, n):
        super().__init__(1.0)
        self.n = n

    def forward(self, losses):
        return torch.arange(len(losses)) < self.n


def test_no_gate_is_the_plain_mean_of_speechbrains_loss(gated):
    brain = gated(gate=NoGate())
    given = batch(1)
    cosines = brain.compute_forward(given, sb.Stage.TRAIN)
    loss = brain.compute_objectives(cosines, given, sb.Stage.TRAIN)
    reference = LogSoftmaxWrapper(AdditiveAngularMargin(0.2, 30.0))
    expected = reference(cosines[:, None], given.label[:, None])
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


def test_gated_loss_is_the_mean_over_the_selected(gated):
    brain = gated(gate=Among(2))
    given = batch(1)
    cosines = brain.compute_forward(given, sb.Stage.TRAIN)
    loss = brain.compute_objectives(cosines, given, sb.Stage.TRAIN)
    reference = LogSoftmaxWrapper(AdditiveAngularMargin(0.2, 30.0))
    expected = reference(cosines[:2, None], given.label[:2, None])
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


def test_an_anchor_adds_to_the_loss_and_pulls_back(gated):
    """With no utterance selected the anchor is all that trains."""
    brain = gated(gate=FixedGate(1e-9))
    network = brain.modules.encoder.network
    start = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    anchored = gated(
        gate=FixedGate(1e-9),
        encoder=brain.modules.encoder,
        anchor=Anchor(start, 2.0),
    )
    expected = anchored.modules.anchor(network).item()
    loss = anchored.fit_batch(batch(1))
    assert expected > 0 and float(loss) == pytest.approx(expected, rel=1e-5)
    assert anchored.modules.anchor(network).item() < expected


def test_a_gate_may_weight(gated):
    """The weighted mean; above one half counts as selected."""

    class Weights(Gate):
        def forward(self, losses):
            return torch.tensor([1.0, 0.6, 0.5, 0.4, 0.2, 0.0])

    brain = gated(gate=Weights(1.0))
    given = batch(1)
    cosines = brain.compute_forward(given, sb.Stage.TRAIN)
    loss = brain.compute_objectives(cosines, given, sb.Stage.TRAIN)
    losses = brain.modules.aam(cosines, given.label).detach().numpy()
    expected = np.average(losses, weights=brain.modules.gate(None))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert brain.epoch_summary()["selected_share"] == pytest.approx(2 / 6)
    correction = LabelCorrection(BATCH, confidence=0.5)
    brain = gated(gate=Weights(1.0), correction=correction)
    sure = torch.nn.functional.one_hot(given.label, CLASSES).float()
    brain.clean_cosines = lambda batch: sure
    loss = brain.compute_objectives(cosines, given, sb.Stage.TRAIN)
    expected = np.average(losses, weights=[1.0, 0.6, 1, 1, 1, 1])
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_rejecting_all_changes_nothing_and_is_finite(gated):
    """A first step, so that Adam has no momentum to go on with."""
    brain = gated(gate=FixedGate(1e-9))
    before = weights(brain)
    loss = brain.fit_batch(batch(1))
    assert loss == 0
    assert brain.optimizer_step == 1  # a step is taken, DDP's ranks agree
    assert changed(brain, before) == set()
    summary = brain.epoch_summary()
    assert summary["accuracy"] == 0 and summary["selected_share"] == 0
    assert all(p.isfinite().all() for p in brain.modules.parameters())


def test_rejecting_all_leaves_adam_without_a_gradient(gated):
    """After a real step only Adam's decaying momentum moves weights."""
    brain = gated(gate=NoGate())
    brain.fit_batch(batch(1))
    moments = copy.deepcopy(brain.optimizer.state_dict()["state"])
    brain.modules["gate"] = FixedGate(1e-9)
    brain.fit_batch(batch(1))
    after = brain.optimizer.state_dict()["state"]
    for name, moment in moments.items():
        torch.testing.assert_close(
            after[name]["exp_avg"], 0.9 * moment["exp_avg"]
        )


def test_what_passed_outlasts_epochs_that_did_not_visit_it(gated):
    """Of many utterances an epoch visits a part; the last visit counts."""
    brain = gated(gate=Among(3))
    for shift, passed in ((0, [0, 1, 2]), (2, [0, 1, 2, 3, 4])):
        given = batch(1)
        given.row += shift
        brain.fit_batch(given)
        brain.epoch_summary()
        assert brain.tally.last["passed"].tolist() == passed
    brain.modules["gate"] = Among(1)
    brain.fit_batch(batch(1))
    brain.epoch_summary()
    assert brain.tally.last["passed"].tolist() == [0]


@pytest.mark.parametrize("n", [1, 3, BATCH])
def test_accuracy_counts_the_selected_only(gated, n):
    brain = gated(gate=Among(n))
    given = batch(1)
    # The first is right, the second wrong, the third right; the rejected
    # ones are right, too, and must not count.
    cosines = torch.nn.functional.one_hot(given.label, CLASSES).float() * 0.5
    cosines[1] = cosines[1].roll(1)
    brain.compute_objectives(cosines, given, sb.Stage.TRAIN)
    summary = brain.epoch_summary()
    assert summary["accuracy"] == pytest.approx((n - (n > 1)) / n)
    assert summary["selected_share"] == pytest.approx(n / BATCH)


def test_gate_sees_the_losses_of_the_epoch(gated, monkeypatch):
    gate = FixedGate(7.0)
    ended = []
    monkeypatch.setattr(gate, "end_epoch", ended.append)
    brain = gated(gate=gate)
    for number in range(3):
        brain.fit_batch(batch(1, number))
    summary = brain.epoch_summary()
    (losses,) = ended
    # Each utterance was seen three times; the last time counts.
    assert losses.shape == (BATCH,) and losses.dtype == np.float32
    last = brain.tally.last
    assert np.array_equal(losses <= 7.0, last["selected"])
    assert np.array_equal(losses, last["losses"])
    assert last["rows"].tolist() == list(range(BATCH))
    assert summary["tau"] == last["tau"] == 7.0
    brain.on_stage_start(sb.Stage.TRAIN, 2)
    others = batch(1)
    others.row += 2
    brain.fit_batch(others)
    brain.epoch_summary()
    # The first epoch's are forgotten, also those that this one did not visit.
    assert len(ended[1]) == BATCH
    assert brain.tally.last["rows"].tolist() == list(range(2, BATCH + 2))
    assert np.array_equal(brain.tally.last["losses"], ended[1])


def test_gate_losses_are_float32_under_autocast(gated):
    """bfloat16 cosines would be steps of 0.12 in a scale of 30."""
    brain = gated(run_opts={"precision": "bf16"})
    brain.fit_batch(batch(1))
    ((_, losses, *_),) = brain.tally.seen
    assert losses.dtype == torch.float32
    with brain.training_ctx:
        cosines = brain.compute_forward(batch(1), sb.Stage.TRAIN)
    assert cosines.dtype == torch.float32


def test_stage_two_learns_a_batch_by_heart(gated):
    brain = gated()
    losses = [float(brain.fit_batch(batch(1))) for _ in range(80)]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def test_rows_are_kept_by_themselves(gated):
    """A tensor that a loader's worker shares keeps a file open."""
    brain = gated()
    given = batch(1)
    given.row.share_memory_()
    brain.fit_batch(given)
    assert not brain.tally.seen[0][0].is_shared()


def test_corrected_labels_are_trained_with_the_margin_on_them(gated):
    """What the gate rejects and the network is sure of counts as relabelled."""
    correction = LabelCorrection(BATCH, scale=10.0, confidence=0.5)
    brain = gated(gate=FixedGate(3.0), correction=correction)
    given = batch(1)
    believed = (given.label + torch.tensor([0, 0, 1, 1, 0, 0])) % CLASSES
    sure = torch.tensor([1, 1, 1, 0, 1, 1])[:, None]
    cosines = sure * torch.nn.functional.one_hot(believed, CLASSES).float()
    brain.clean_cosines = lambda batch: cosines
    loss = brain.compute_objectives(cosines, given, sb.Stage.TRAIN)
    # The fourth is rejected, and the network has no opinion of it.
    expected = brain.modules.aam(cosines, believed)[[0, 1, 2, 4, 5]].mean()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    _, losses, selected, corrected, votes = brain.tally.seen[-1]
    assert selected.tolist() == [True, True, False, False, True, True]
    assert corrected.tolist() == [-1, -1, believed[2].item(), -1, -1, -1]
    unsure = torch.tensor([0, 0, 0, 1, 0, 0]) > 0
    assert torch.equal(votes, believed.where(~unsure, -1))
    # The gate goes on judging the pseudo-label, not the correction.
    assert losses[2] == brain.modules.aam(cosines, given.label)[2]


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_given_labels_pass_every_gate_and_stay(gated, share):
    """By a mask or weights; the correction would change the rejected."""

    class Low(Gate):
        def forward(self, losses):
            return losses > 1e9 if not share else 0 * losses + share

    known = torch.tensor([True, False] * (BATCH // 2))
    brain = gated(
        gate=Low(1.0),
        given=GivenRows(known),
        correction=LabelCorrection(BATCH, confidence=0.0),
    )
    given = batch(1)
    believed = torch.nn.functional.one_hot((given.label + 1) % CLASSES, CLASSES)
    brain.clean_cosines = lambda batch: believed.float()
    loss = brain.compute_objectives(believed.float(), given, sb.Stage.TRAIN)
    brain.epoch_summary()
    last = brain.tally.last
    assert last["selected"].tolist() == known.tolist()
    assert ((last["corrected"] < 0) == known.numpy()).all()
    labels = torch.where(known, given.label, (given.label + 1) % CLASSES)
    expected = brain.modules.aam(believed.float(), labels).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_votes_of_an_epoch_are_those_of_all_processes(gated):
    """Another rank's utterances vote here, too; what is selected as well."""
    correction = LabelCorrection(BATCH + 1, confidence=0.0)
    brain = gated(gate=NoGate(), correction=correction)
    given = batch(1)
    believed = (given.label + 1) % CLASSES
    cosines = torch.nn.functional.one_hot(believed, CLASSES).float()
    brain.clean_cosines = lambda batch: cosines
    brain.compute_objectives(cosines, given, sb.Stage.TRAIN)
    row = torch.tensor([BATCH])
    others = (row, torch.tensor([9.0]), row < 0, row - row - 1, row - row + 3)
    brain.tally.seen.append(others)
    brain.epoch_summary()
    assert (correction.votes[:, 0] == -2).all()  # of the epoch to come
    assert correction.votes[:, 1].tolist() == [*believed.tolist(), 3]
    assert (correction.votes[:, 2:] == -2).all()


def test_nothing_is_learnt_from_clean_crops(gated):
    """Neither gradients nor statistics, and training goes on as before."""
    brain = gated(gate=FixedGate(0.1), correction=LabelCorrection(BATCH))
    brain.modules.encoder.network.norm = torch.nn.BatchNorm1d(DIM)
    before = weights(brain)
    cosines = brain.clean_cosines(batch(1))
    assert not cosines.requires_grad
    assert brain.modules.training and not changed(brain, before)


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        (FixedGate(1e-9), "only 0 % through (selected_share) at tau 1e-09"),
        (FixedGate(1e9), "lets 100.0 % through (selected_share) at tau 1e+09"),
    ],
)
def test_a_gate_that_selects_nothing_or_all_is_warned_of(gated, gate, words):
    brain = gated(gate=gate)
    run_epoch(brain, 1, batch(2, seed=9))
    assert words in warnings_of(brain)


def test_no_gate_selects_all_as_was_asked_for(gated):
    brain = gated(gate=NoGate())
    run_epoch(brain, 1, batch(2, seed=9))
    assert brain.record["selected_share"] == 1
    assert "through" not in warnings_of(brain)


@given(st.lists(st.integers(0, 5), max_size=20))
def test_the_last_visit_of_each_utterance(rows):
    found = last_visits(np.array(rows, dtype=np.int64))
    expected = {row: place for place, row in enumerate(rows)}
    assert found.tolist() == sorted(expected.values())
