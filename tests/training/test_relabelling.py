"""Stage II by a teacher's labels, on a tiny encoder."""

import numpy as np
import pytest
import speechbrain as sb
import torch
from tiny_brains import CLASSES, batch

from lgl_plugin.nnet.gates import Gate


class Weights(Gate):
    def forward(self, losses):
        return torch.tensor([1.0, 0.6, 0.5, 0.4, 0.2, 0.0])


def test_the_loss_is_of_the_teachers_labels_weighted_by_its_losses(make):
    """Two utterances were relabelled, and one pseudo-speaker is dead."""
    brain, given = make("relabelled", gate=Weights(1.0)), batch(1)
    teacher = brain.modules.correction
    with torch.no_grad():  # another than the student
        for parameter in teacher.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    rows = np.arange(10)
    teacher.end_epoch(rows, np.array([0, 1, 2, 0, 0, 0, 2, 0, 0, 1]))
    labels = teacher.labels[given.row]
    alive = [0, 1, 2]

    def losses(encoder, classifier, wavs):
        """ArcFace over those alive, each utterance by itself."""
        found = []
        for wav, label in zip(wavs, labels):
            cosines = classifier(encoder(wav[None])[:, None])[0, 0]
            logits = [30 * cosines[k] for k in alive]
            angle = torch.acos(cosines[label]) + 0.2
            logits[label] = 30 * torch.cos(angle)
            found.append(-torch.stack(logits).log_softmax(0)[label].item())
        return found

    brain.modules.augment.forward = lambda wavs: wavs
    cosines = brain.compute_forward(given, sb.Stage.TRAIN)
    loss = brain.compute_objectives(cosines, given, sb.Stage.TRAIN)
    wavs = given.sig.data[:, 0]
    student = losses(brain.modules.encoder, brain.modules.classifier, wavs)
    expected = np.average(student, weights=Weights(1.0)(None))
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    _, judged, _, corrected, votes = brain.tally.seen[0]
    by_teacher = losses(teacher.encoder, teacher.classifier, wavs)
    assert judged.tolist() == pytest.approx(by_teacher, rel=1e-4)
    changed = labels != given.label
    assert corrected.tolist() == torch.where(changed, labels, -1).tolist()
    assert 3 not in votes

    figures = brain.epoch_summary()
    assert figures["pseudo_speakers"] == len(teacher.labels.unique())
    # Of those that the epoch did not visit the teacher has labels, too; of
    # held-out ones it has none.
    others = teacher.labels[6:9].tolist()
    assert others != [n % CLASSES for n in range(6, 9)]
    teacher.labels[9] = -1
    now = brain.judged_labels(np.arange(10) % CLASSES)
    assert now.tolist() == [*labels.tolist(), *others, 9 % CLASSES]
