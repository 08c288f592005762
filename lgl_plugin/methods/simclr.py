"""Stage I by SimCLR with augmentation adversarial training."""

import torch
from torch import Tensor, nn

from lgl_plugin.methods.method import Loss, Method, Views
from lgl_plugin.nnet.losses import (
    AugmentationDiscriminator,
    NTXent,
    augmentation_adversarial_loss,
    gradient_reversal,
)
from lgl_plugin.utils.checks import check_from


class SimCLR(Method):
    """Contrastive learning with augmentation adversarial training.

    Paper, sections 2.1 and 4; Huh et al. 2020. Two disjoint crops a, b of an
    utterance must be similar to each other, and dissimilar to all other crops
    of the batch. With two augmentations A and B the views are A(a), A(b), B(b).
    The adversary predicts if two views have the same augmentation, and the
    encoder learns to hide that.

    Arguments
    ---------
    encoder, embedding_size, n_utterances
        As for each method.
    adversarial_weight : float
        Weight of the adversary's reversed gradient, from 0. With 0 there is
        neither an adversary nor a third view: plain SimCLR.
    scale_init : float
        Initial scale, by which cosines are multiplied.
    """

    def __init__(
        self,
        encoder: nn.Module,
        embedding_size: int,
        n_utterances: int,
        adversarial_weight: float = 3.0,
        scale_init: float = 10.0,
    ) -> None:
        super().__init__()
        check_from(0, adversarial_weight=adversarial_weight)
        self.adversarial_weight = adversarial_weight
        self.contrastive = NTXent(scale_init)
        if adversarial_weight:
            self.adversary = AugmentationDiscriminator(embedding_size)

    def views(self, crops: Tensor, augment: nn.Module) -> tuple[Views, Views]:
        """Makes A(a), A(b), B(b); without an adversary A(a), B(b)."""
        if self.adversary is None:
            return super().views(crops, augment)
        first, second = crops.unbind(1)
        shared = augment.draw(*first.shape)  # type: ignore[operator]
        views = [
            augment(first, shared),
            augment(second, shared),
            augment(second),
        ]
        return [torch.stack(views)], []

    def forward(
        self,
        embeddings: Views,
        teacher_embeddings: Views,
        groups: Tensor,
        done: float,
    ) -> Loss:
        """Returns the sum of the contrastive loss and the adversarial one."""
        views = embeddings[0]
        loss, accuracy = self.contrastive(views[0], views[-1], groups.flatten())
        figures = {"accuracy": accuracy}
        if self.adversary is not None:
            adversarial, right = augmentation_adversarial_loss(
                self.adversary,
                *gradient_reversal(views, self.adversarial_weight),
            )
            loss = loss + adversarial
            figures["discriminator_accuracy"] = right
        return loss, figures

    def adversary_loss(self, embeddings: Views) -> Tensor:
        """Returns the discriminator's loss of the three views."""
        return augmentation_adversarial_loss(self.adversary, *embeddings[0])[0]
