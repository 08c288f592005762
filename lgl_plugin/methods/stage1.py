"""The Brain of Stage I: it trains an encoder by any method."""

from typing import Any

import torch
from speechbrain.dataio.batch import PaddedBatch
from torch import Tensor

from lgl_plugin.methods.method import Views, embedded
from lgl_plugin.training.brain import SpeakerBrain
from lgl_plugin.utils.distributed import average_gradients, unwrapped

# Entries of the tally that are not figures of a method.
COUNTS = ("utterances", "batches", "skipped", "with_figures")


class Stage1Brain(SpeakerBrain):
    """Trains an encoder by the module `method`, a `methods.method.Method`.

    The batch's `sig` holds two crops of each utterance, (batch, 2, samples).
    """

    @property
    def method(self) -> Any:
        """The method, without the wrapper of data parallelism."""
        return unwrapped(self.modules.method)

    def init_optimizers(self):
        """Makes the encoder's optimiser, and one for an adversary, if any."""
        method = self.method
        adversary = []
        if method.adversary is not None:
            adversary = list(method.adversary.parameters())
        separate = method.separate_parameters()
        excluded = {id(p) for p in (*adversary, *separate)}
        rest = [
            p
            for module in (self.modules.encoder, method)
            for p in module.parameters()
            if p.requires_grad and id(p) not in excluded
        ]
        groups = self._groups(rest)
        if separate:
            group = {"params": separate, "lr_scale": method.separate_lr}
            groups.append({**group, "weight_decay": 0.0, "clip_each": False})
        self.optimizers_dict = {"encoder": self.opt_class(groups)}
        if adversary:
            optimizer = self.opt_class(self._groups(adversary))
            self.optimizers_dict["adversary"] = optimizer
        self.optimizer = self.optimizers_dict["encoder"]
        for name, optimizer in self.optimizers_dict.items():
            self.checkpointer.add_recoverable(f"{name}_optimizer", optimizer)

    def _groups(self, parameters):
        """Groups parameters by SpeechBrain's option on the decay of vectors."""
        if not self.remove_vector_weight_decay:
            return [{"params": parameters}]
        vectors = [p for p in parameters if p.ndim == 1]
        others = [p for p in parameters if p.ndim != 1]
        return [{"params": vectors, "weight_decay": 0.0}, {"params": others}]

    def compute_forward(self, batch, stage):
        """Returns embeddings of the encoder's and of the teacher's views."""
        views, teacher_views = self.method.views(
            self.crops(batch), self.modules.augment
        )
        embeddings = [embedded(self.modules.encoder, group) for group in views]
        return embeddings, self.method.teach(teacher_views)

    def compute_objectives(self, outputs, batch, stage):
        """Returns the method's loss, after its adversary's own step."""
        embeddings, teacher_embeddings = outputs
        if self.method.adversary is not None:
            self.train_adversary([group.detach() for group in embeddings])
        loss, figures = self.modules.method(
            embeddings, teacher_embeddings, self.groups(batch), self.done
        )
        # All figures of a step count, or none: an accuracy is finite even if
        # the loss is not.
        is_finite = loss.detach().isfinite()
        for value in figures.values():
            is_finite = is_finite & value.isfinite()
        # Detached, because a user's own method could otherwise keep each step's
        # graph in memory until the epoch's end.
        figures = {
            name: value.detach().where(is_finite, 0)
            for name, value in figures.items()
        }
        self.tally.add(with_figures=is_finite.float(), **figures)
        return loss

    def groups(self, batch: PaddedBatch) -> Tensor:
        """Numbers the groups of the crops (2, batch): their utterance."""
        return torch.stack([batch.row, batch.row])

    def train_adversary(self, embeddings: Views) -> None:
        """Does the adversary's own step, before the encoder's."""
        optimizer = self.optimizers_dict["adversary"]
        optimizer.zero_grad()
        # float32, because small gradients would vanish in float16: no scaler
        # protects the adversary's.
        with torch.autocast(self.device_type, enabled=False):
            views = [group.float() for group in embeddings]
            self.method.adversary_loss(views).backward()
        average_gradients(self.method.adversary)
        self.guard.step(optimizer)

    def optimizers_step(self, limit: float | None = None) -> None:
        """Clips (by default as the method asks), steps, moves the teacher."""
        super().optimizers_step(limit or self.method.clip_each)
        encoder = unwrapped(self.modules.encoder)
        self.method.end_step(encoder, self.done, self.skipped)

    def epoch_summary(self) -> dict[str, float]:
        """Returns the means of the method's figures."""
        counts = self.tally.total()
        steps = max(float(counts.get("with_figures", 0)), 1.0)
        figures = [name for name in counts if name not in COUNTS]
        return {name: float(counts[name]) / steps for name in figures}
