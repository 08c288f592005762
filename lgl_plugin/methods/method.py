"""The base of Stage I's methods: views, loss and state."""

from typing import Any

import torch
from torch import Tensor, nn

from lgl_plugin.nnet.augment import augmented
from lgl_plugin.nnet.momentum import cosine_ramp

Loss = tuple[Tensor, dict[str, Tensor]]
Views = list[Tensor]  # (n_views, batch, ...), one entry for each length


class Method(nn.Module):
    """Base of Stage I's methods, which `Stage1Brain` trains.

    A subclass takes the encoder to train, the size of its embeddings and the
    number of utterances, then the yaml's arguments. It implements `forward`,
    and `views` if two augmented views do not suffice. An argument out of range
    raises ValueError. The state dict has all weights of the method, those of a
    teacher and a queue included, so that a checkpoint has them.

    Attributes
    ---------
    name : str
        Name of the phase in metrics.jsonl: that of the class in lower case.
    teacher : lgl_plugin.nnet.momentum.MomentumCopy or None
        A slow copy of the encoder.
    teacher_momentum : float
        Share of the teacher's weights that a step keeps at first; only of
        methods with a teacher.
    adversary : torch.nn.Module or None
        A part with its own optimiser. It steps before the encoder, by the loss
        of `adversary_loss`.
    clip_each : float or None
        Largest gradient norm of each parameter; afterwards the yaml's
        `max_grad_norm` limits the norm of all together.
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

        Returns the encoder's views and the teacher's: lists of (n_views, batch,
        samples) with an entry for each length. This base makes one augmented
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
            Numbers of the utterances or clusters that the crops belong to,
            int64, (2, batch). Crops of one group are not each other's
            negatives.
        done : float
            Finished share of the training, from 0 to 1.

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
        """Returns the share of the teacher that a step keeps, rising to 1."""
        return cosine_ramp(self.teacher_momentum, 1.0, done)

    def followers(self, encoder: nn.Module) -> list[tuple[Any, nn.Module]]:
        """Pairs each `MomentumCopy` with the module that it follows."""
        return [] if self.teacher is None else [(self.teacher, encoder)]

    def end_step(
        self, encoder: nn.Module, done: float, skipped: Tensor
    ) -> None:
        """Moves the teacher after a step, unless the step was skipped."""
        for teacher, student in self.followers(encoder):
            teacher.follow(student, self.momentum(done), skipped)

    def separate_parameters(self) -> list[nn.Parameter]:
        """Lists the weights that get neither weight decay nor `clip_each`."""
        return []


def embedded(encoder: nn.Module, views: Tensor) -> Tensor:
    """Embeds views (n_views, batch, ...) in one pass of a network."""
    return encoder(views.flatten(0, 1)).unflatten(0, views.shape[:2])


def local_views(crops: Tensor, n_views: int, augment: nn.Module) -> Tensor:
    """Cuts views of half a crop's length, and augments each.

    The two crops (batch, 2, samples) are used in turn. Each utterance has its
    own random place. Returns (n_views, batch, samples // 2).
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
