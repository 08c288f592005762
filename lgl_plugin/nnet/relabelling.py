"""Labels by a momentum teacher, which change from epoch to epoch."""

import numpy as np
import torch
from torch import Tensor, nn

from lgl_plugin.nnet.momentum import MomentumCopy
from lgl_plugin.utils.checks import check_from, check_share

# 1 - momentum falls linearly to this share of its first value.
LAST_SHARE = 0.1


class TeacherLabels(nn.Module):
    """Labels that a momentum teacher gives anew after each epoch: SSRL.

    Cai and Li 2024 (arXiv 2401.01473). The teacher, a slow copy of encoder
    and classifier that normalises by running statistics, names a
    pseudo-speaker for each utterance's clean crop. The label is the one that
    most of the last epochs named; the cluster's counts as the first of these,
    so that a label changes once two epochs agree on another. A tie leaves it,
    or goes to the newest. A pseudo-speaker that no utterance has any more
    dies out: nothing is compared with it.

    Arguments
    ---------
    encoder, classifier : torch.nn.Module
        What the teacher begins as a copy of; the classifier gives K cosines.
    labels : torch.Tensor
        The clusters' labels, int64 (n_utterances,); -1 for none.
    n_labels : int
        How many there are, K.
    momentum : float
        How much of the teacher a step keeps, in [0, 1). What it takes from
        the student falls in a straight line to a tenth: from 0.999 to 0.9999
        in the source, whose training has a hundred times the steps of an
        hour's.
    epochs : int
        How many vote, at least 1.

    Attributes
    ---------
    labels : torch.Tensor
        Of the epoch under way, int64 (n_utterances,).
    alive : torch.Tensor
        Which pseudo-speakers an utterance has, bool (K,).

    Example
    -------
    >>> parts = torch.nn.Identity(), torch.nn.Identity()
    >>> teacher = TeacherLabels(*parts, torch.tensor([0, 1, 1]), n_labels=2)
    >>> for _ in range(2):
    ...     teacher.end_epoch(np.array([0, 1]), np.array([1, 1]))
    >>> teacher.labels, teacher.alive
    (tensor([1, 1, 1]), tensor([False,  True]))
    """

    def __init__(
        self,
        encoder: nn.Module,
        classifier: nn.Module,
        labels: Tensor,
        n_labels: int,
        momentum: float = 0.99,
        epochs: int = 5,
    ) -> None:
        super().__init__()
        check_share(momentum=momentum)
        check_from(1, epochs=epochs)
        self.momentum = momentum
        self.encoder = MomentumCopy(encoder, buffers=True)
        self.classifier = MomentumCopy(classifier, buffers=True)
        self.labels = nn.Buffer(labels.clone())
        votes = torch.full((len(labels), epochs), -1, dtype=torch.int32)
        votes[:, 0] = labels
        self.votes = nn.Buffer(votes)  # the newest first; -1 for none
        self.alive = nn.Buffer(torch.zeros(n_labels, dtype=torch.bool))
        self._count()

    def forward(self, cosines: Tensor) -> Tensor:
        """Puts dead pseudo-speakers out of reach of cosines (batch, K)."""
        return cosines.masked_fill(~self.alive, -1.0)

    def follow(
        self,
        encoder: nn.Module,
        classifier: nn.Module,
        done: float,
        skipped: Tensor,
    ) -> None:
        """Moves the teacher, as `MomentumCopy.follow` does.

        `done` is the share of the training that is done, from 0 to 1.
        """
        taken = 1 - (1 - LAST_SHARE) * min(done, 1.0)
        taken *= 1 - self.momentum
        self.encoder.follow(encoder, 1 - taken, skipped)
        self.classifier.follow(classifier, 1 - taken, skipped)

    def end_epoch(self, rows: np.ndarray, votes: np.ndarray) -> None:
        """Takes the teacher's votes (n,) on rows (n,), each once; -1 is none.

        They are those of all processes.
        """
        said = votes >= 0
        index = torch.from_numpy(rows[said]).to(self.votes.device)
        newest = torch.from_numpy(votes[said]).to(self.votes)[:, None]
        held = torch.cat([newest, self.votes[index, :-1]], dim=1)
        self.votes[index] = held
        epochs = held.shape[1]
        alike = (held[:, :, None] == held[:, None]).sum(2) * (held >= 0)
        stays = held == self.labels[index, None]
        age = torch.arange(epochs, device=held.device)
        # One score for each: of equal ones a GPU would pick any.
        score = 2 * epochs * alike + epochs * stays - age
        place = score.argmax(1, keepdim=True)
        self.labels[index] = held.gather(1, place)[:, 0].long()
        self._count()

    def _count(self):
        """Notes which pseudo-speakers an utterance has."""
        self.alive.zero_()
        self.alive[self.labels[self.labels >= 0]] = True
