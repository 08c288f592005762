"""Stage I by SDPN: self-distillation prototypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lgl_plugin.methods.dino import prototype_figures
from lgl_plugin.methods.method import Loss, Method, local_views
from lgl_plugin.nnet.distillation import (
    cross_entropy,
    dimension_regularisation,
    koleo,
    mean_entropy_gap,
    sinkhorn,
)
from lgl_plugin.nnet.heads import DistillationHead, Prototypes
from lgl_plugin.nnet.momentum import MomentumCopy, cosine_ramp
from lgl_plugin.nnet.queue import EmbeddingQueue
from lgl_plugin.utils.distributed import concatenated

# What the teacher's logits are divided by, beside the temperature.
SHARPENING = 0.25


class SDPN(Method):
    """Self-distillation prototypes network (Chen et al. 2024).

    Augmented local views are to have the distribution over prototypes that
    the teacher gives the clean global view. Sinkhorn's iterations spread the
    targets of a batch over all prototypes, me-max does so with the student's,
    and the KoLeo regulariser pushes embeddings apart.

    The first crop of an utterance is the global view; local views are half as
    long, cut from both crops in turn. The encoder and the head have a teacher
    each, which normalises by its own batch; the prototypes are shared.

    Arguments
    ---------
    encoder, embedding_size, n_utterances
        As for each method.
    n_prototypes : int
        1,024 in 3D-Speaker, for VoxCeleb2. No more than utterances in a batch
        can be used at a time: take fewer, or a queue.
    hidden_size, bottleneck_size : int
        Of the head; 2,048 and 256 in 3D-Speaker.
    n_local : int
        Local views of an utterance.
    temperature : float
        Of the student; the teacher's is a quarter of it.
    teacher_momentum : float
        How much of the teacher a step keeps, rising to 1 by a cosine. 0.996 in
        the source, whose training has a hundred times the steps of an hour's.
    mean_entropy, koleo, dimension : float
        Weights of me-max, of KoLeo over the embeddings and of their
        dimension regularisation; the latter in arXiv 2505.13826.
    queue_size : int
        Teacher's outputs of earlier batches that share the prototypes.
    clip_each : float, optional
        Longest gradient of each parameter but the prototypes.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    def __init__(
        self,
        encoder: nn.Module,
        embedding_size: int,
        n_utterances: int,
        n_prototypes: int = 128,
        hidden_size: int = 512,
        bottleneck_size: int = 256,
        n_local: int = 4,
        temperature: float = 0.1,
        teacher_momentum: float = 0.99,
        mean_entropy: float = 1.0,
        koleo: float = 0.1,
        dimension: float = 0.0,
        queue_size: int = 0,
        clip_each: float | None = 3.0,
    ) -> None:
        super().__init__()
        if not n_local >= 1:
            raise ValueError(f"n_local must be 1 or more, got {n_local}")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
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
        self.weights = {
            "mean_entropy": mean_entropy,
            "koleo": koleo,
            "dimension": dimension,
        }
        self.clip_each = clip_each

    def momentum(self, done: float) -> float:
        """Returns how much of the teacher a step keeps."""
        return cosine_ramp(self.teacher_momentum, 1.0, done)

    def end_step(self, encoder: nn.Module, done: float) -> None:
        """Moves the teacher and its head after a step."""
        super().end_step(encoder, done)
        self.teacher_head.follow(self.head, self.momentum(done))

    def views(
        self, crops: torch.Tensor, augment: nn.Module
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Makes the local views, and the clean global one for the teacher."""
        views = local_views(crops, self.n_local, augment)
        return [views], [crops[None, :, 0]]

    def forward(
        self,
        embeddings: list[torch.Tensor],
        targets: list[torch.Tensor],
        rows: torch.Tensor,
        done: float,
    ) -> Loss:
        """Returns the loss, its parts and how the prototypes are used."""
        wanted = self.targets(targets[0][0], rows)
        views = embeddings[0]
        logits = self.prototypes(self.head(views))
        found = F.softmax(logits / self.temperature, dim=-1)
        parts = {
            "mean_entropy": mean_entropy_gap(found),
            "koleo": torch.stack([koleo(view) for view in views]).sum(),
        }
        if self.weights["dimension"]:
            parts["dimension"] = dimension_regularisation(views.flatten(0, 1))
        loss = cross_entropy(wanted, logits, self.temperature)
        for name, part in parts.items():
            loss = loss + self.weights[name] * part
        figures = {name: part.detach() for name, part in parts.items()}
        return loss, {**figures, **prototype_figures(wanted)}

    @torch.no_grad()
    def targets(
        self, embeddings: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        """Returns the teacher's probabilities (batch, K), spread evenly."""
        vectors = self.teacher_head(embeddings)
        others = None
        if self.queue is not None:
            held = self._probabilities(self.queue.vectors)
            # A place that is empty counts for nothing.
            others = held * (self.queue.rows >= 0)[:, None]
            self.queue.add(concatenated(rows), concatenated(vectors))
        return sinkhorn(self._probabilities(vectors), others)

    def _probabilities(self, vectors):
        """Returns the sharpened softmax of the teacher's vectors."""
        temperature = SHARPENING * self.temperature
        return F.softmax(self.prototypes(vectors) / temperature, dim=-1)
