"""Checkpoints of a fit leave out the frozen weights of teachers, too."""

import pytest
import torch
from tiny_brains import DIM, tiny_encoder

from lgl_plugin.methods.moco import MoCo
from lgl_plugin.nnet.relabelling import TeacherLabels
from lgl_plugin.training.fit import _checkpointer


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
