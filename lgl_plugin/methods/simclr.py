"""Stage I by SimCLR with augmentation adversarial training."""

import speechbrain as sb
import torch
from speechbrain.utils.logger import get_logger

from lgl_plugin.nnet.losses import (
    augmentation_adversarial_loss,
    gradient_reversal,
)
from lgl_plugin.training.brain import SpeakerBrain

logger = get_logger(__name__)


class SimCLRBrain(SpeakerBrain):
    """Stage I: contrastive learning with augmentation adversarial training.

    Paper, sections 2.1 and 4; Huh et al. 2020. Further modules: contrastive
    (`losses.NTXent`) and discriminator (`losses.AugmentationDiscriminator`).
    The batch's `sig` holds two disjoint crops a, b; with two augmentations A
    and B the views are A(a), A(b), B(b).
    """

    def init_optimizers(self):
        """One optimiser for the encoder, one for the discriminator."""
        discriminator = list(self.modules.discriminator.parameters())
        apart = set(discriminator)
        self.optimizer = self.opt_class(
            [p for p in self.modules.parameters() if p not in apart]
        )
        self.discriminator_optimizer = self.opt_class(discriminator)
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
        """Embeddings of the views, shape (views, batch, dim)."""
        crops = batch.sig.data.to(self.device, non_blocking=True)
        if stage != sb.Stage.TRAIN:
            return self.held_out_embeddings(crops)
        first, second = crops.unbind(1)
        shared = self.modules.augment.draw(*first.shape)
        views = [
            self.modules.augment(first, shared),
            self.modules.augment(second, shared),
            self.modules.augment(second),
        ]
        return self.embed(torch.cat(views)).unflatten(0, (3, -1))

    def compute_objectives(self, embeddings, batch, stage):
        """Contrastive loss, and the adversarial one in training."""
        loss, accuracy = self.modules.contrastive(embeddings[0], embeddings[-1])
        if stage != sb.Stage.TRAIN:
            self.held_out.append(embeddings.cpu())
            return loss
        self.train_discriminator(embeddings.detach())
        adversarial, confusion = augmentation_adversarial_loss(
            self.modules.discriminator,
            *gradient_reversal(embeddings, self.hparams.adversarial_weight),
        )
        self.count(accuracy=accuracy, discriminator=confusion)
        return loss + adversarial

    def train_discriminator(self, embeddings):
        """The discriminator's own step, before the encoder's."""
        self.discriminator_optimizer.zero_grad()
        loss, _ = augmentation_adversarial_loss(
            self.modules.discriminator, *embeddings
        )
        loss.backward()
        self.guarded_step(self.discriminator_optimizer)

    def epoch_summary(self):
        """Contrastive accuracy, and how often the discriminator was right."""
        batches = self.tally["batches"]
        return {
            "accuracy": float(self.tally["accuracy"] / batches),
            "discriminator_accuracy": float(
                self.tally["discriminator"] / batches
            ),
        }
