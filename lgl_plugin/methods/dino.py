"""Stage I by DINO and RDINO: self-distillation with a momentum teacher."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lgl_plugin.methods.method import Loss, Method, Views, local_views
from lgl_plugin.nnet.augment import augmented
from lgl_plugin.nnet.distillation import dino_loss, prototype_figures
from lgl_plugin.nnet.heads import DistillationHead, Prototypes
from lgl_plugin.nnet.momentum import MomentumCopy
from lgl_plugin.nnet.redundancy import spread_terms
from lgl_plugin.utils.checks import check_above0, check_from, check_share
from lgl_plugin.utils.distributed import all_gather

# Share of the training in which the teacher's temperature moves to its last
# value.
WARM = 0.2
# Weight of RDINO's variance relative to its covariance. The source has 10, but
# half of that applies to the teacher's embeddings, which get no gradient.
VARIANCE = 5.0
# Share of the training in which RDINO's weight rises from a quarter to all.
REGULARISED = 1 / 7
# Momentum of `centre`, the running mean of the teacher's logits.
CENTRE_MOMENTUM = 0.9


class DINO(Method):
    """Self-distillation without labels (Caron et al. 2021), and RDINO.

    Each augmented view must predict the teacher's distribution over prototypes
    of the other global view. Both crops of an utterance are global views. Local
    views are half as long and are cut from the two crops in turn. Centring and
    sharpening of the teacher's logits prevent a collapse.

    Encoder, head and prototypes have a teacher each. The teachers normalise by
    their own batch.

    Arguments
    ---------
    encoder, embedding_size, n_utterances
        As for each method.
    n_prototypes : int
        Number of prototypes; 65,536 in wespeaker and 3D-Speaker, for VoxCeleb2.
    hidden_size, bottleneck_size : int
        Sizes of the head; 2,048 and 256 in wespeaker and 3D-Speaker.
    n_local : int
        Number of local views of an utterance.
    temperature : float
        Temperature of the student.
    teacher_temperatures : list of float
        Temperature of the teacher at first, and from a fifth of the training
        on. With wespeaker's 0.04 and 0.07 the teacher finds all prototypes
        equally likely after a hundred steps, before the student has learnt
        anything.
    teacher_momentum : float
        Share of the teacher's weights that a step keeps at first; it rises to 1
        by a cosine. The sources have 0.996 for a hundred times the steps of a
        training on one hour of speech.
    regularisation : float
        Weight of RDINO's variance and covariance of the mean global embedding;
        0 for DINO, 0.2 in 3D-Speaker. As in 3D-Speaker, the covariance is
        divided by the number of prototypes, which makes it small.
    frozen : float
        Share of the training in which prototypes are frozen: an epoch in the
        sources. The teacher's first targets would pull the prototypes together.
    clip_each : float, optional
        Largest gradient norm of each parameter.
    """

    def __init__(
        self,
        encoder: nn.Module,
        embedding_size: int,
        n_utterances: int,
        n_prototypes: int = 1024,
        hidden_size: int = 512,
        bottleneck_size: int = 256,
        n_local: int = 4,
        temperature: float = 0.1,
        teacher_temperatures: Sequence[float] = (0.025, 0.025),
        teacher_momentum: float = 0.99,
        regularisation: float = 0.0,
        frozen: float = 1 / 150,
        clip_each: float | None = 3.0,
    ) -> None:
        super().__init__()
        if len(teacher_temperatures) != 2:
            raise ValueError(
                "teacher_temperatures must be two, the first and the last, got "
                f"{teacher_temperatures}"
            )
        first, last = teacher_temperatures
        check_above0(
            temperature=temperature,
            first_teacher_temperature=first,
            last_teacher_temperature=last,
            hidden_size=hidden_size,
            bottleneck_size=bottleneck_size,
            clip_each=1.0 if clip_each is None else clip_each,
        )
        check_from(2, n_prototypes=n_prototypes)
        check_from(0, n_local=n_local, regularisation=regularisation)
        check_share(teacher_momentum=teacher_momentum, frozen=frozen)
        self.head = DistillationHead(
            embedding_size, hidden_size, bottleneck_size
        )
        self.prototypes = Prototypes(bottleneck_size, n_prototypes)
        self.teacher = MomentumCopy(encoder)
        self.teacher_head = MomentumCopy(self.head)
        self.teacher_prototypes = MomentumCopy(self.prototypes)
        self.centre = nn.Buffer(torch.zeros(n_prototypes))
        self.n_local = n_local
        self.temperature = temperature
        self.teacher_temperatures = teacher_temperatures
        self.teacher_momentum = teacher_momentum
        self.regularisation = regularisation
        self.frozen = frozen
        self.clip_each = clip_each

    def followers(self, encoder: nn.Module) -> list[tuple[Any, nn.Module]]:
        """Pairs the teacher, its head and its prototypes with the student's."""
        return [
            *super().followers(encoder),
            (self.teacher_head, self.head),
            (self.teacher_prototypes, self.prototypes),
        ]

    def views(self, crops: Tensor, augment: nn.Module) -> tuple[Views, Views]:
        """Makes two global views, for the teacher too, and the local ones."""
        views = [augmented(crops, augment)]
        if self.n_local:
            views.append(local_views(crops, self.n_local, augment))
        return views, views[:1]

    def forward(
        self,
        embeddings: Views,
        teacher_embeddings: Views,
        groups: Tensor,
        done: float,
    ) -> Loss:
        """Returns the loss, and how the teacher uses the prototypes."""
        targets = self.teacher_probabilities(teacher_embeddings[0], done)
        views = torch.cat(embeddings)
        logits = self.prototypes(self.head(views), frozen=done < self.frozen)
        loss = dino_loss(targets, logits, self.temperature)
        if self.regularisation:
            variance, covariance = spread_terms(embeddings[0].mean(0))
            dim, n_prototypes = views.shape[-1], logits.shape[-1]
            extra = VARIANCE * variance + covariance * dim / n_prototypes
            ramp = 0.25 + 0.75 * min(done / REGULARISED, 1.0)
            loss = loss + ramp * self.regularisation * extra
        return loss, prototype_figures(targets)

    @torch.no_grad()
    def teacher_probabilities(self, embeddings: Tensor, done: float) -> Tensor:
        """Returns probabilities (2, batch, K), and moves the centre."""
        logits = self.teacher_prototypes(self.teacher_head(embeddings))
        first, last = self.teacher_temperatures
        temperature = first + (last - first) * min(done / WARM, 1.0)
        targets = F.softmax((logits - self.centre) / temperature, dim=-1)
        # The mean of the processes' means (batches are equal), because
        # gathering the logits would take gigabytes.
        mean = all_gather(logits.flatten(0, 1).mean(0, keepdim=True)).mean(0)
        # One non-finite step would spoil the centre of all later steps.
        mean = torch.where(mean.isfinite().all(), mean, self.centre)
        self.centre.lerp_(mean, 1 - CENTRE_MOMENTUM)
        return targets
