"""The base of Stage I methods: views, a loss, and the state that it keeps."""

from typing import Any

import torch
from torch import Tensor, nn

from lgl_plugin.nnet.augment import augmented
from lgl_plugin.nnet.momentum import cosine_ramp

Loss = tuple[Tensor, dict[str, Tensor]]
Views = list[Tensor]  # (n_views, batch, ...) of each length


class Method(nn.Module):
    """Base of Stage I's methods, which one Brain trains: `Stage1Brain`.

    A subclass is made with the encoder that it is to train, the size of its
    embeddings and the number of utterances, then by the yaml's arguments. It
    gives `forward`, and `views` where two augmented ones will not do. An
    argument out of its range is a ValueError. All its weights, those of a
    teacher and a queue included, are in its state dict, so that a checkpoint
    has them.

    Attributes
    ---------
    name : str
        Of the phase in metrics.jsonl: that of the class in lower case.
    teacher : lgl_plugin.nnet.momentum.MomentumCopy or None
        A copy of the encoder that follows it.
    teacher_momentum : float
        How much of the teacher a step keeps at first; of methods with one.
    adversary : torch.nn.Module or None
        A part that has an optimiser of its own, and its step before the
        encoder's, by the loss of `adversary_loss`.
    clip_each : float or None
        Largest gradient norm of each parameter; the yaml's `max_grad_norm`
        then limits the norm of all together.
    separate_lr : float
        Learning rate of `separate_parameters` as a multiple of the others'.
    """

    name: str
    teacher: Any
    teacher_momentum: float
    adversary: Any
    clip_each: float | None
    separate_lr: float = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.name = type(self).__name__.lower()
        self.teacher = self.adversary = self.clip_each = None

    def views(self, crops: Tensor, augment: nn.Module) -> tuple[Views, Views]:
        """Makes views of crops (batch, 2, samples), disjoint if they can be.

        Returns those for the encoder and those for the teacher: lists of
        (n_views, batch, samples), an entry for each length. Here an augmented
        view of each crop, and none for a teacher.
        """
        return [augmented(crops, augment)], []

    @torch.no_grad()
    def teach(self, views: Views) -> Views:
        """Embeds the teacher's views: a list of (n_views, batch, dim)."""
        return [embedded(self.teacher, group) for group in views]

    def forward(
        self,
        embeddings: Views,
        teacher_embeddings: Views,
        groups: Tensor,
        done: float,
    ) -> Loss:
        """Returns the loss and figures of a step.

        Arguments
        ---------
        embeddings, teacher_embeddings : list of torch.Tensor
            Of the encoder's and of the teacher's views, (n_views, batch, dim).
        groups : torch.Tensor
            Numbers of what the crops are of, int64, (2, batch): an utterance
            or a cluster. Crops of one group are no negatives of each other.
        done : float
            Share of the training that is done, from 0 to 1.

        Returns
        -------
        torch.Tensor
            The loss, a scalar with a graph.
        dict of torch.Tensor
            Scalars, detached, whose means over an epoch are logged.
        """
        raise NotImplementedError

    def adversary_loss(self, embeddings: Views) -> Tensor:
        """Returns the loss of `adversary`, of detached embeddings."""
        raise NotImplementedError

    def check_batch(self, batch_size: int) -> None:
        """Warns if a batch, of all processes, is too small for the method."""

    def momentum(self, done: float) -> float:
        """Returns how much of the teacher a step keeps, rising to all."""
        return cosine_ramp(self.teacher_momentum, 1.0, done)

    def followers(self, encoder: nn.Module) -> list[tuple[Any, nn.Module]]:
        """Pairs each `MomentumCopy` with the module that it follows."""
        return [] if self.teacher is None else [(self.teacher, encoder)]

    def end_step(
        self, encoder: nn.Module, done: float, skipped: Tensor
    ) -> None:
        """Moves the teacher after a step, unless that was skipped."""
        for teacher, student in self.followers(encoder):
            teacher.follow(student, self.momentum(done), skipped)

    def separate_parameters(self) -> list[nn.Parameter]:
        """Lists weights without weight decay and without `clip_each`."""
        return []


def embedded(encoder: nn.Module, views: Tensor) -> Tensor:
    """Maps views (n_views, batch, ...) by a network in one pass."""
    return encoder(views.flatten(0, 1)).unflatten(0, views.shape[:2])


def local_views(crops: Tensor, n_views: int, augment: nn.Module) -> Tensor:
    """Cuts views of half a crop's length, and augments each.

    The crops (batch, 2, samples) are drawn from in turn, at a place of its own
    for each utterance. Returns (n_views, batch, samples // 2).
    """
    n_utterances, _, n_samples = crops.shape
    length = n_samples // 2
    places = torch.arange(length, device=crops.device)
    views = []
    for number in range(n_views):
        start = torch.randint(
            n_samples - length + 1, (n_utterances, 1), device=crops.device
        )
        views.append(augment(crops[:, number % 2].gather(1, start + places)))
    return torch.stack(views)
