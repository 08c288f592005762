"""Stage I by SDPN: self-distillation prototypes."""

from typing import Any

import torch
import torch.nn.functional as F
from speechbrain.utils.logger import get_logger
from torch import Tensor, nn

from lgl_plugin.methods.method import Loss, Method, Views, local_views
from lgl_plugin.nnet.distillation import (
    cross_entropy,
    dimension_regularisation,
    koleo,
    mean_entropy_gap,
    off_diagonal_regularisation,
    prototype_figures,
    sinkhorn,
)
from lgl_plugin.nnet.heads import DistillationHead, Prototypes
from lgl_plugin.nnet.momentum import MomentumCopy
from lgl_plugin.nnet.queue import EmbeddingQueue
from lgl_plugin.utils.checks import check_above0, check_from, check_share
from lgl_plugin.utils.distributed import all_gather

logger = get_logger(__name__)

# Factor of the student's temperature that gives the teacher's.
SHARPENING = 0.25
# Largest number of prototypes per utterance of a batch before a warning;
# 3D-Speaker has 2.7 with its batch of 384.
MOST_PROTOTYPES = 3
# Forms of the dimension regularisation, by the name of their weight.
DIMENSIONS = {
    "dimension": dimension_regularisation,
    "off_diagonal": off_diagonal_regularisation,
}


class SDPN(Method):
    """Self-distillation prototypes network (Chen et al. 2024).

    Augmented local views must predict the distribution over prototypes that the
    teacher gives the clean global view. Sinkhorn's iterations spread the
    targets of a batch over all prototypes, me-max spreads the student's
    predictions, and the KoLeo regulariser pushes embeddings apart.

    The first crop of an utterance is the global view. Local views are half as
    long and are cut from both crops in turn. Encoder and head have a teacher
    each, which normalises by its own batch. The prototypes are shared.

    Arguments
    ---------
    encoder, embedding_size, n_utterances
        As for each method.
    n_prototypes : int
        Number of prototypes; 1,024 in 3D-Speaker, for VoxCeleb2. A batch can
        use at most as many prototypes as it has utterances: take fewer
        prototypes, or a queue.
    prototype_lr : float
        Learning rate of the prototypes as a multiple of that of other weights.
        3D-Speaker sums the prototypes' gradient over its four processes, which
        is 4 times the mean.
    hidden_size, bottleneck_size : int
        Sizes of the head; 2,048 and 256 in 3D-Speaker.
    n_local : int
        Number of local views of an utterance.
    temperature : float
        Temperature of the student; the teacher's is a quarter of that.
    teacher_momentum : float
        Share of the teacher's weights that a step keeps at first; it rises to 1
        by a cosine. The source has 0.996 for a hundred times the steps of a
        training on one hour of speech.
    mean_entropy, koleo, dimension, off_diagonal : float
        Weights of me-max, of KoLeo over the embeddings, and of the two forms of
        the embeddings' dimension regularisation: Frobenius and off-diagonal.
        The source (arXiv 2505.13826) uses one form.
    queue_size : int
        Number of teacher's outputs of earlier batches that share the
        prototypes.
    clip_each : float, optional
        Largest gradient norm of each parameter except the prototypes.
    """

    def __init__(
        self,
        encoder: nn.Module,
        embedding_size: int,
        n_utterances: int,
        n_prototypes: int = 128,
        prototype_lr: float = 1.0,
        hidden_size: int = 512,
        bottleneck_size: int = 256,
        n_local: int = 4,
        temperature: float = 0.1,
        teacher_momentum: float = 0.99,
        mean_entropy: float = 1.0,
        koleo: float = 0.1,
        dimension: float = 0.0,
        off_diagonal: float = 0.0,
        queue_size: int = 0,
        clip_each: float | None = 3.0,
    ) -> None:
        super().__init__()
        check_above0(
            temperature=temperature,
            prototype_lr=prototype_lr,
            hidden_size=hidden_size,
            bottleneck_size=bottleneck_size,
            clip_each=1.0 if clip_each is None else clip_each,
        )
        check_from(2, n_prototypes=n_prototypes)
        check_from(1, n_local=n_local)
        self.weights = {
            "mean_entropy": mean_entropy,
            "koleo": koleo,
            "dimension": dimension,
            "off_diagonal": off_diagonal,
        }
        check_from(0, **self.weights, queue_size=queue_size)
        check_share(teacher_momentum=teacher_momentum)
        self.head = DistillationHead(
            embedding_size, hidden_size, bottleneck_size
        )
        self.prototypes = Prototypes(bottleneck_size, n_prototypes)
        self.teacher = MomentumCopy(encoder)
        self.teacher_head = MomentumCopy(self.head)
        self.queue = None
        if queue_size:
            self.queue = EmbeddingQueue(queue_size, bottleneck_size)
        self.n_local = n_local
        self.temperature = temperature
        self.teacher_momentum = teacher_momentum
        self.clip_each = clip_each
        self.separate_lr = prototype_lr

    def check_batch(self, batch_size: int) -> None:
        """Warns if a batch can use few of the prototypes.

        With 1,024 prototypes and batches of 128, the EER was 3.66 % after half
        of a training that ends at 1.80 % with batches of 384 (3D-Speaker, issue
        261).
        """
        size = batch_size + (len(self.queue.groups) if self.queue else 0)
        most = len(self.prototypes.weight)
        if most > MOST_PROTOTYPES * size:
            logger.warning(
                "n_prototypes: a step can use only %d of %d prototypes, as "
                "many as it has utterances. Take fewer prototypes, a larger "
                "batch or a queue_size.",
                size,
                most,
            )

    def followers(self, encoder: nn.Module) -> list[tuple[Any, nn.Module]]:
        """Pairs the teacher and its head with the student's."""
        return [*super().followers(encoder), (self.teacher_head, self.head)]

    def separate_parameters(self) -> list[nn.Parameter]:
        """Lists the prototypes.

        Only their direction matters: weight decay would shorten them and so
        raise their effective learning rate.
        """
        return [self.prototypes.weight]

    def views(self, crops: Tensor, augment: nn.Module) -> tuple[Views, Views]:
        """Makes the local views, and the clean global one for the teacher."""
        views = local_views(crops, self.n_local, augment)
        return [views], [crops[None, :, 0]]

    def forward(
        self,
        embeddings: Views,
        teacher_embeddings: Views,
        groups: Tensor,
        done: float,
    ) -> Loss:
        """Returns the loss, its parts and figures of the prototypes' use."""
        targets, figures = self.teacher_probabilities(
            teacher_embeddings[0][0], groups[0]
        )
        views = embeddings[0]
        logits = self.prototypes(self.head(views))
        probabilities = F.softmax(logits / self.temperature, dim=-1)
        parts = {
            "mean_entropy": mean_entropy_gap(probabilities),
            "koleo": torch.stack([koleo(view) for view in views]).sum(),
        }
        for name, term in DIMENSIONS.items():
            if self.weights[name]:
                parts[name] = term(views.flatten(0, 1))
        loss = cross_entropy(targets, logits, self.temperature)
        for name, part in parts.items():
            loss = loss + self.weights[name] * part
        figures.update((name, part.detach()) for name, part in parts.items())
        return loss, figures

    @torch.no_grad()
    def teacher_probabilities(
        self, embeddings: Tensor, groups: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the teacher's probabilities (batch, K), spread evenly.

        The figures are computed before Sinkhorn's iterations, which would hide
        that the teacher gives all utterances one prototype.
        """
        vectors = self.teacher_head(embeddings)
        others = None
        if self.queue is not None:
            queued = self._probabilities(self.queue.vectors)
            # Zeros keep empty places of the queue out of Sinkhorn's iterations.
            others = queued * (self.queue.groups >= 0)[:, None]
            self.queue.add(all_gather(groups), all_gather(vectors))
        own = self._probabilities(vectors)
        return sinkhorn(own, others), prototype_figures(own)

    def _probabilities(self, vectors):
        """Returns the sharpened softmax of the teacher's vectors."""
        temperature = SHARPENING * self.temperature
        return F.softmax(self.prototypes(vectors) / temperature, dim=-1)
