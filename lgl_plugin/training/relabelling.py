"""Stage II without rounds: a momentum teacher relabels after each epoch."""

import numpy as np
import torch
from speechbrain.dataio.batch import PaddedBatch

from lgl_plugin.training.loss_gated import LossGatedBrain
from lgl_plugin.utils.distributed import unwrapped


class RelabellingBrain(LossGatedBrain):
    """Stage II on pseudo-labels of a momentum teacher: SSRL.

    Cai and Li 2024 (arXiv 2401.01473). The module `correction` is a
    `nnet.relabelling.TeacherLabels`. The gate judges the teacher's loss of the
    clean crop. The student is trained on the augmented crop.

    After an epoch `corrected` of `tally.last` has the labels that the epoch was
    trained on, -1 for utterances with their cluster's label.
    """

    def judge(
        self,
        outputs: torch.Tensor,
        batch: PaddedBatch,
        rows: torch.Tensor,
        labels: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """Returns losses and weights by the teacher's labels, and its votes."""
        modules, clustered = self.modules, labels
        teacher = modules.correction
        labels, outputs = teacher.labels[rows], teacher(outputs)
        clean = self.clean_cosines(batch)
        judged = modules.aam(clean, labels).detach()
        weights = modules.gate(judged)
        # The teacher does not vote on crops with NaN or infinite cosines, nor
        # on user labels.
        may_vote = clean.isfinite().all(1)
        if "given" in modules:
            weights = modules.given(rows, weights)
            may_vote &= ~modules.given.given[rows]
        selected = weights > 0.5
        self.count(outputs, labels, selected)
        corrected = torch.where(labels == clustered, -1, labels)
        votes = torch.where(may_vote, clean.argmax(1), -1)
        losses = modules.aam(outputs, labels)
        return losses, weights, (judged, selected, corrected, votes)

    @torch.no_grad()
    def clean_cosines(self, batch: PaddedBatch) -> torch.Tensor:
        """Returns the teacher's cosines for the crops without augmentation."""
        teacher = self.modules.correction
        parts = teacher.encoder, teacher.classifier
        return teacher(self.cosines(*parts, batch.sig.data[:, 0]))

    def optimizers_step(self, limit: float | None = None) -> None:
        """Steps, and moves the teacher."""
        super().optimizers_step(limit)
        names = ("encoder", "classifier")
        students = (unwrapped(self.modules[name]) for name in names)
        self.modules.correction.follow(*students, self.done, self.skipped)

    def judged_labels(self, labels: np.ndarray) -> np.ndarray:
        """Returns the last epoch's labels; `labels` (N,) are the clusters'."""
        rows, corrected = self.tally.last["rows"], self.tally.last["corrected"]
        # Earlier epochs may have relabelled rows that this epoch did not visit.
        current = self.modules.correction.labels.cpu().numpy()
        judged = np.where(current >= 0, current, labels)
        # At the epoch's end the teacher may have relabelled visited rows.
        judged[rows] = np.where(corrected >= 0, corrected, labels[rows])
        return judged

    def epoch_summary(self) -> dict[str, float]:
        """Adds the share of changed labels, and the number of live speakers."""
        teacher = self.modules.correction
        before = teacher.labels.clone()
        figures = super().epoch_summary()
        changed = int((teacher.labels != before).sum())
        return {
            **figures,
            "relabelled_share": changed / int((before >= 0).sum()),
            "pseudo_speakers": int(teacher.alive.sum()),
        }
