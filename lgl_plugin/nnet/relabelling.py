"""Pseudo-labels that a momentum teacher renews after each epoch (SSRL)."""

import numpy as np
import torch
from torch import Tensor, nn

from lgl_plugin.nnet.momentum import MomentumCopy
from lgl_plugin.utils.checks import check_from, check_share

# 1 - momentum falls linearly to this share of its first value.
LAST_SHARE = 0.1


class TeacherLabels(nn.Module):
    """Labels that a momentum teacher renews after each epoch: SSRL.

    Cai and Li 2024 (arXiv 2401.01473). The teacher is a slow copy of encoder
    and classifier that normalises by running statistics. In each epoch the
    teacher predicts a pseudo-speaker from each utterance's clean crop. An
    utterance's label is its most frequent prediction in the last epochs. The
    cluster's label counts as the first prediction, so a label changes once two
    epochs agree on another one. In a tie the current label stays if it is among
    the most frequent; otherwise the newest prediction wins. A pseudo-speaker
    without utterances is dead: no loss compares an utterance with it.

    Arguments
    ---------
    encoder, classifier : torch.nn.Module
        The modules that the teacher starts as a copy of. The classifier returns
        K cosines.
    labels : torch.Tensor
        The clusters' labels, int64 (n_utterances,); -1 for none.
    n_labels : int
        Number of pseudo-speakers, K.
    momentum : float
        Share of the teacher's weights that a step keeps at first, in [0, 1).
        The rest, taken from the student, falls linearly to a tenth over the
        training. The source's share rises from 0.999 to 0.9999 in a hundred
        times the steps of a training on one hour of speech.
    epochs : int
        Number of epochs whose predictions vote, at least 1.

    Attributes
    ---------
    labels : torch.Tensor
        Of the epoch under way, int64 (n_utterances,).
    alive : torch.Tensor
        True for pseudo-speakers that have an utterance, bool (K,).

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
        self.votes = nn.Buffer(votes)  # newest first; -1 for no vote
        self.alive = nn.Buffer(torch.zeros(n_labels, dtype=torch.bool))
        self._count()

    def forward(self, cosines: Tensor) -> Tensor:
        """Sets the cosines (batch, K) of dead pseudo-speakers to -1."""
        return cosines.masked_fill(~self.alive, -1.0)

    def follow(
        self,
        encoder: nn.Module,
        classifier: nn.Module,
        done: float,
        skipped: Tensor,
    ) -> None:
        """Moves the teacher, as `MomentumCopy.follow` does.

        `done` is the finished share of the training, from 0 to 1.
        """
        rate = 1 - (1 - LAST_SHARE) * min(done, 1.0)
        rate *= 1 - self.momentum
        self.encoder.follow(encoder, 1 - rate, skipped)
        self.classifier.follow(classifier, 1 - rate, skipped)

    def end_epoch(self, rows: np.ndarray, votes: np.ndarray) -> None:
        """Adds the teacher's votes of an epoch, and renews the labels.

        `rows` (n,) are the voting utterances of all processes, each once.
        `votes` (n,) are their predicted pseudo-speakers, -1 for none.
        """
        valid = votes >= 0
        index = torch.from_numpy(rows[valid]).to(self.votes.device)
        newest = torch.from_numpy(votes[valid]).to(self.votes)[:, None]
        history = torch.cat([newest, self.votes[index, :-1]], dim=1)
        self.votes[index] = history
        epochs = history.shape[1]
        counts = (history[:, :, None] == history[:, None]).sum(2) * (
            history >= 0
        )
        is_current = history == self.labels[index, None]
        age = torch.arange(epochs, device=history.device)
        # Scores are distinct: argmax of equal scores may differ on a GPU.
        score = 2 * epochs * counts + epochs * is_current - age
        place = score.argmax(1, keepdim=True)
        self.labels[index] = history.gather(1, place)[:, 0].long()
        self._count()

    def _count(self):
        """Marks the pseudo-speakers that have an utterance."""
        self.alive.zero_()
        self.alive[self.labels[self.labels >= 0]] = True
