"""Training that really collapses is named by the health report.

Each case takes away what keeps a method from collapse, trains for two short
epochs, and is compared with the same training of the whole method.
"""

import functools

import speechbrain as sb
import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.nnet.schedulers import StepScheduler
from tiny_brains import DIM, TIME, begin, make_brain, tiny_encoder, warnings_of

from lgl_plugin.methods import dino, sdpn
from lgl_plugin.methods.dino import DINO
from lgl_plugin.methods.sdpn import SDPN
from lgl_plugin.methods.vicreg import VICReg
from lgl_plugin.nnet.augment import NoAugmentation

UTTERANCES, LR = 16, 0.02
HEAD = {"hidden_size": 16, "bottleneck_size": 8, "n_prototypes": 16}


def utterances(seed):
    """A batch whose utterances have a sound each, loud and soft in turn."""
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator)
    sound, n_frames = draw(UTTERANCES, 1, 1, 20), TIME // 20
    frames = 3 * sound * draw(UTTERANCES, 1, n_frames, 1)
    frames = frames + 0.3 * draw(UTTERANCES, 2, n_frames, 20)
    rows = [
        {"id": str(row), "sig": sig, "row": row, "partner": row, "bad": ""}
        for row, sig in enumerate(frames.flatten(2))
    ]
    return PaddedBatch(rows)


def warnings_after(folder, make, steps=25):
    """The health report's warnings after two epochs of a method."""
    torch.manual_seed(1)
    encoder = tiny_encoder()
    method = make(encoder, DIM, UTTERANCES)
    modules = {"method": method, "augment": NoAugmentation()}
    brain = begin(make_brain("vicreg", folder, modules, encoder=encoder))
    brain.hparams.lr_annealing = StepScheduler(LR, 1.0)
    brain.steps_per_epoch, brain.epochs_in_all = steps, 2
    for epoch in (1, 2):
        brain.on_stage_start(sb.Stage.TRAIN, epoch)
        brain.modules.train()
        for brain.step in range(1, steps + 1):
            loss = brain.fit_batch(utterances(brain.step))
            average = brain.update_average(loss, 0.0)
        brain.on_stage_end(sb.Stage.TRAIN, average, epoch)
        brain.on_stage_start(sb.Stage.VALID, epoch)
        brain.modules.eval()
        brain.step = 1
        brain.evaluate_batch(utterances(99), sb.Stage.VALID)
        brain.on_stage_end(sb.Stage.VALID, 0.0, epoch)
    return warnings_of(brain)


def vicreg(*arguments, **weights):
    """VICReg of the embeddings themselves.

    A projector would take the collapse upon itself: its batch normalisation
    hides from the loss how far embeddings vary.
    """
    method = VICReg(*arguments, **weights)
    method.projector = torch.nn.Identity()
    return method


def quick(method, **arguments):
    """A method whose teacher follows within an epoch."""
    return functools.partial(
        method, teacher_momentum=0.9, **{**HEAD, **arguments}
    )


def test_vicreg_without_variance_and_covariance(tmp_path):
    assert not warnings_after(tmp_path / "whole", vicreg, 40)
    bare = functools.partial(vicreg, variance=0.0, covariance=0.0)
    text = warnings_after(tmp_path / "bare", bare, 40)
    assert "the embeddings have collapsed: different held-out" in text


def test_vicreg_whose_projector_takes_the_collapse_upon_itself(tmp_path):
    assert not warnings_after(tmp_path / "whole", VICReg, 150)
    bare = functools.partial(VICReg, variance=0.0, covariance=0.0)
    text = warnings_after(tmp_path / "bare", bare, 150)
    assert "the projections have collapsed: all utterances have" in text


def test_dino_with_a_teacher_blunter_than_the_student(tmp_path):
    assert not warnings_after(tmp_path / "whole", quick(DINO))
    make = quick(DINO, teacher_temperatures=(0.2, 0.2))
    text = warnings_after(tmp_path / "blunt", make)
    assert "collapsed: it finds all prototypes alike" in text


def test_dino_without_a_centre(tmp_path, monkeypatch):
    monkeypatch.setattr(dino, "CENTRE_MOMENTUM", 1.0)
    text = warnings_after(tmp_path, quick(DINO))
    assert "collapsed: it gives nearly all utterances one prototype" in text


def test_sdpn_without_sinkhorn_and_me_max(tmp_path, monkeypatch):
    assert not warnings_after(tmp_path / "whole", quick(SDPN))
    monkeypatch.setattr(sdpn, "sinkhorn", lambda own, others: own)
    make = quick(SDPN, mean_entropy=0.0, koleo=0.0)
    text = warnings_after(tmp_path / "bare", make)
    assert "collapsed: it gives nearly all utterances one prototype" in text
