"""A fit: its batches and classes, its log and its checkpoints."""

import types

import numpy as np
import pytest
import torch
from tiny_brains import DIM, tiny_encoder

from lgl_plugin.dataio.manifest import Manifest
from lgl_plugin.methods.moco import MoCo
from lgl_plugin.nnet.relabelling import TeacherLabels
from lgl_plugin.training.fit import _checkpointer, epoch_line, fit, part_of


def make(kind):
    """An encoder on a frozen, shared layer, and what has a copy of it."""
    encoder = tiny_encoder()
    encoder.network.pretrained = "frame."
    with torch.no_grad():
        encoder.network.frame.weight.fill_(0.5)
        encoder.network.frame.bias.fill_(0.25)
    encoder.network.frame.requires_grad_(False)
    if kind == "method":
        return encoder, MoCo(encoder, DIM, 20, queue_size=4)
    classifier, labels = torch.nn.Linear(DIM, 4), torch.arange(20) % 4
    return encoder, TeacherLabels(encoder, classifier, labels, 4)


@pytest.mark.parametrize("kind", ["correction", "method"])
def test_a_teachers_frozen_weights_are_left_out(kind, tmp_path):
    encoder, other = make(kind)
    modules = {"encoder": encoder, kind: other}
    with torch.no_grad():  # as steps leave them
        for part in (encoder, other):
            for name, weight in part.named_parameters():
                if "frame." not in name:
                    weight.add_(torch.randn_like(weight))
    saved = _checkpointer(tmp_path, modules).save_checkpoint()
    before = other.state_dict()
    kept = torch.load(saved.path / f"{kind}.ckpt", weights_only=True)
    missing = before.keys() - kept.keys()
    assert {name.rpartition(".network.")[2] for name in missing} == {
        "frame.weight",
        "frame.bias",
    }
    encoder, again = make(kind)
    resumed = {"encoder": encoder, kind: again}
    _checkpointer(tmp_path, resumed).recover_if_possible()
    assert before.keys() == again.state_dict().keys()
    for name, value in again.state_dict().items():
        assert torch.equal(value, before[name]), name
    # Beside another speech model nobody would notice.
    encoder, again = make(kind)
    with torch.no_grad():
        for name, weight in again.named_parameters():
            weight.add_("frame." in name)
    with pytest.raises(ValueError, match="frozen weights are others"):
        _checkpointer(
            tmp_path, {"encoder": encoder, kind: again}
        ).recover_if_possible()


@pytest.mark.parametrize(
    "left, words", [(0, "0 s"), (119, "119 s"), (180, "3 min"), (9000, "2 h")]
)
def test_an_epoch_is_a_line(left, words):
    record = {
        "epoch": 3,
        "loss": 3.21456,
        "accuracy": 0.3123,
        "lr": 0.00095,
        "pseudo_eer": 21.345,
        "utterances_per_second": 153.4,
        "nmi": 0.5,  # of true labels, which the line leaves out
    }
    figures = (
        "loss 3.215, accuracy 0.312, lr 0.00095, pseudo-EER 21.3 %, "
        "153 utterances/s"
    )
    line = epoch_line("iter1/gated", record, 60, left)
    assert line == f"iter1/gated: epoch 3 of 60, {figures}, {words} left"
    line = epoch_line("stage1", {**record, "accuracy": None}, 3, 0.0)
    assert line == f"stage1: epoch 3 of 3, {figures}".replace(
        "accuracy 0.312, ", ""
    )


def begin_fit(session, labels):
    """Begins to fit a phase on labels of 20 utterances."""
    session.seed(1)
    names = [f"{n}.wav" for n in range(20)]
    session.manifest = Manifest.of((n, n, 0.0, 3.0, "") for n in names)
    session.settings.augment = torch.nn.Identity()
    session.settings.crop_seconds, session.settings.sample_rate = 1.0, 16000
    encoder = types.SimpleNamespace(network=torch.nn.Linear(2, 2))
    encoder.state_dict = encoder.network.state_dict
    fit(
        session,
        pytest.fail,
        {"encoder": encoder},
        session.run.folder / "gated",
        1,
        labels=labels,
        rows=np.arange(20),
        phase="gated",
    )


def test_fewer_utterances_than_a_batch_are_an_error(session):
    """The last, smaller batch is left out: there would be no step at all."""
    labels = np.where(np.arange(20) < 7, 0, -1)
    with pytest.raises(ValueError, match="gated: 7 utterances make no batch"):
        begin_fit(session, labels)


@pytest.mark.parametrize("balanced", [False, True])
def test_classes_to_balance_are_those_of_the_labelled(
    session, balanced, monkeypatch
):
    class Drawn(Exception):
        pass

    def sampler(*arguments):
        raise Drawn(arguments[-1])

    monkeypatch.setattr("lgl_plugin.training.fit.PassSampler", sampler)
    session.settings.balanced_sampling = balanced
    session.settings.steps_per_epoch = 1
    session.held_out_rows = np.arange(2)
    with pytest.raises(Drawn) as drawn:
        begin_fit(session, np.where(np.arange(20) < 17, np.arange(20) % 3, -1))
    (classes,) = drawn.value.args
    assert (classes is not None) == balanced
    if balanced:
        assert classes.tolist() == [n % 3 for n in range(17)]


def test_phases_share_one_course_of_the_learning_rate():
    course = {"classifier": 6, "gated": 4, "large_margin": 1}
    found = part_of(course, "gated")
    assert found == {"epochs": 4, "epochs_before": 6, "epochs_in_all": 11}
    assert part_of(course, "one of the user's own") == {}
