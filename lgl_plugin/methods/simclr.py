"""Stage I by SimCLR with augmentation adversarial training."""

from __future__ import annotations

import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.utils.optimizers import rm_vector_weight_decay

from lgl_plugin.nnet.losses import (
    augmentation_adversarial_loss,
    gradient_reversal,
)
from lgl_plugin.training.brain import SpeakerBrain
from lgl_plugin.utils.distributed import synchronised


class SimCLRBrain(SpeakerBrain):
    """Stage I: contrastive learning with augmentation adversarial training.

    Paper, sections 2.1 and 4; Huh et al. 2020. Further modules: contrastive
    (`losses.NTXent`) and discriminator (`losses.AugmentationDiscriminator`).
    The batch's `sig` holds two disjoint crops a, b; with two augmentations A
    and B the views are A(a), A(b), B(b).
    """

    def init_optimizers(self):
        """Makes one optimiser for the encoder, one for the discriminator."""
        rest = torch.nn.ModuleDict(self.modules)
        discriminator = rest.pop("discriminator")
        parameters = (
            rm_vector_weight_decay
            if self.remove_vector_weight_decay
            else torch.nn.Module.parameters
        )
        self.optimizer = self.opt_class(parameters(rest))
        self.discriminator_optimizer = self.opt_class(parameters(discriminator))
        self.optimizers_dict = {
            "encoder": self.optimizer,
            "discriminator": self.discriminator_optimizer,
        }
        for name, optimizer in self.optimizers_dict.items():
            self.checkpointer.add_recoverable(f"{name}_optimizer", optimizer)

    def freeze_optimizers(self, optimizers):
        """Leaves the discriminator to its own step."""
        return {"encoder": optimizers["encoder"]}

    def compute_forward(self, batch, stage):
        """Returns embeddings of the views, (3, batch, dim)."""
        first, second = self.crops(batch).unbind(1)
        shared = self.modules.augment.draw(*first.shape)
        views = [
            self.modules.augment(first, shared),
            self.modules.augment(second, shared),
            self.modules.augment(second),
        ]
        return self.modules.encoder(torch.cat(views)).unflatten(0, (3, -1))

    def compute_objectives(self, embeddings, batch, stage):
        """Returns the contrastive loss and the adversarial one, added."""
        loss, accuracy = self.contrast(embeddings, batch)
        self.train_discriminator(embeddings.detach())
        adversarial, confusion = augmentation_adversarial_loss(
            self.modules.discriminator,
            *gradient_reversal(embeddings, self.hparams.adversarial_weight),
        )
        self.tally.add(accuracy=accuracy, discriminator=confusion)
        return loss + adversarial

    def contrast(
        self, embeddings: torch.Tensor, batch: PaddedBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the contrastive loss of A(a) and B(b), and its accuracy."""
        return self.modules.contrastive(embeddings[0], embeddings[-1])

    def train_discriminator(self, embeddings: torch.Tensor) -> None:
        """Does the discriminator's own step, before the encoder's."""
        self.discriminator_optimizer.zero_grad()
        with synchronised(self.modules.discriminator):
            loss, _ = augmentation_adversarial_loss(
                self.modules.discriminator, *embeddings
            )
            loss.backward()
        self.guard.step(self.discriminator_optimizer)

    def epoch_summary(self) -> dict[str, float]:
        """Returns both accuracies: contrastive and the discriminator's."""
        counts = self.tally.total()
        batches = counts["batches"]
        return {
            "accuracy": float(counts["accuracy"] / batches),
            "discriminator_accuracy": float(counts["discriminator"] / batches),
        }
