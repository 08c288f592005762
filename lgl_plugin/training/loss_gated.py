"""Stage II's Brain: AAM-softmax on pseudo-labels through a loss gate."""

import numpy as np
import speechbrain as sb
import torch
from speechbrain.utils.logger import get_logger

from lgl_plugin.nnet.losses import gated_mean
from lgl_plugin.training.brain import SpeakerBrain

logger = get_logger(__name__)


class LossGatedBrain(SpeakerBrain):
    """Stage II: additive angular margin on pseudo-labels, gated by the loss.

    Paper, sections 2.2 and 3, equation 3. Further modules: classifier
    (cosines to the pseudo-speakers), aam (`losses.AAMSoftmax`), gate and
    memory (both of `lgl_plugin.nnet.gates`), and correction if labels are to be
    corrected (`gates.LabelCorrection`). After an epoch `rows` holds the
    utterances in the order seen, as rows of the manifest, `losses` what the
    gate saw of them, `selected` what it let through at the threshold `tau`
    and `corrected` the labels that were put in the place of others, -1
    elsewhere.
    """

    of_epoch = ("rows", "losses", "selected", "corrected", "tau")
    rows = losses = selected = corrected = tau = None

    def compute_forward(self, batch, stage):
        """Cosines to the pseudo-speakers, or held-out embeddings."""
        crops = batch.sig.data.to(self.device, non_blocking=True)
        if stage != sb.Stage.TRAIN:
            return self.held_out_embeddings(crops)
        return self.cosines(self.modules.augment(crops[:, 0]))

    def cosines(self, wavs, wrapped=True):
        """Cosines (batch, n_clusters) to the pseudo-speakers, float32."""
        embeddings = self.embed(wavs, wrapped)
        classifier = self.module("classifier", wrapped)
        # bfloat16 cosines would be steps of 0.12 in losses of scale 30.
        with torch.autocast(self.device_type, enabled=False):
            return classifier(embeddings[:, None])[:, 0]

    @torch.no_grad()
    def clean_cosines(self, batch):
        """Those of the crops as they are, from which nothing is learnt."""
        crops = batch.sig.data.to(self.device, non_blocking=True)
        self.modules.eval()
        try:
            # Wrapped, it would overwrite what the step's backward needs.
            return self.cosines(crops[:, 0], wrapped=False)
        finally:
            self.modules.train()

    def compute_objectives(self, outputs, batch, stage):
        """The gated mean of the losses (paper, equation 3)."""
        if stage != sb.Stage.TRAIN:
            self.held_out.append(outputs.cpu())
            return torch.zeros(())
        labels = batch.label.to(self.device, non_blocking=True)
        rows = batch.row.to(self.device, non_blocking=True)
        losses = self.modules.aam(outputs, labels)
        remembered = self.modules.memory(rows, losses)
        selected = self.modules.gate(remembered)
        correct = (outputs.argmax(1) == labels) & selected
        self.count(correct=correct.sum(), selected=selected.sum())
        corrected = torch.full_like(labels, -1)
        counted = selected
        if "correction" in self.modules:
            clean = self.clean_cosines(batch)
            corrected = self.modules.correction(clean, selected)
            changed = corrected >= 0
            counted = selected | changed
            labels = torch.where(changed, corrected, labels)
            losses = self.modules.aam(outputs, labels)
        # A copy: what a loader's worker shares would keep a file open each.
        self.seen.append((rows.clone(), remembered, selected, corrected))
        return gated_mean(losses, counted)

    def epoch_summary(self):
        """Accuracy over the selected, their share and the threshold."""
        self.rows, self.losses, self.selected, self.corrected = (
            of.numpy() for of in self.join_seen()
        )
        self.seen = []
        self.modules.memory.overwrite(self.rows, self.losses)
        self.tau = float(self.modules.gate.tau)
        self.modules.gate.end_epoch(self.losses)
        chosen = max(int(self.tally["selected"]), 1)
        return {
            "accuracy": float(self.tally["correct"]) / chosen,
            "selected_share": float(np.mean(self.selected)),
            "corrected_share": float(np.mean(self.corrected >= 0)),
            "tau": self.tau,
        }
