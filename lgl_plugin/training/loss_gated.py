"""Stage II's Brain: AAM-softmax on pseudo-labels through a loss gate."""

import numpy as np
import torch
from speechbrain.dataio.batch import PaddedBatch

from lgl_plugin.nnet.losses import gated_mean
from lgl_plugin.training.brain import SpeakerBrain
from lgl_plugin.utils.distributed import unwrapped


class LossGatedBrain(SpeakerBrain):
    """Stage II: additive angular margin on pseudo-labels, gated by the loss.

    Paper, sections 2.2 and 3, equation 3. The modules are, in addition to
    encoder and augment: classifier (cosines to the pseudo-speakers), aam
    (`losses.AAMSoftmax`) and gate (of `nnet.gates`). Optional modules are
    correction, which corrects labels (`gates.LabelCorrection`), anchor, which
    holds the encoder near its start (`nnet.anchor.Anchor`), and given, if a
    user has given labels (`nnet.given.GivenRows`).

    After an epoch `tally.last` has arrays of the utterances in the order last
    seen, each once: `rows`, their manifest rows, `losses`, which the gate
    judged, `selected`, the gate's selection, and `corrected`, the labels that
    replaced others, -1 for none. `tau` is the gate's threshold. `passed` are
    all rows that were selected at the phase's last visit of each.
    """

    def compute_forward(self, batch, stage):
        """Returns cosines (batch, n_clusters) to the pseudo-speakers."""
        modules = self.modules
        crops = modules.augment(self.crops(batch)[:, 0])
        return self.cosines(modules.encoder, modules.classifier, crops)

    def cosines(
        self,
        encoder: torch.nn.Module,
        classifier: torch.nn.Module,
        wavs: torch.Tensor,
    ) -> torch.Tensor:
        """Returns the waveforms' cosines to the pseudo-speakers, in float32."""
        embeddings = encoder(wavs)
        # At a scale of 30 the rounding of bfloat16 cosines would change losses
        # in steps of 0.12.
        with torch.autocast(self.device_type, enabled=False):
            return classifier(embeddings[:, None])[:, 0]

    @torch.no_grad()
    def clean_cosines(self, batch: PaddedBatch) -> torch.Tensor:
        """Returns cosines of crops without augmentation, without a graph."""
        self.modules.eval()
        try:
            # DistributedDataParallel's forward would overwrite state that the
            # step's backward needs.
            encoder = unwrapped(self.modules.encoder)
            classifier = unwrapped(self.modules.classifier)
            return self.cosines(encoder, classifier, batch.sig.data[:, 0])
        finally:
            self.modules.train()

    def compute_objectives(self, outputs, batch, stage):
        """Returns the gated mean of the losses (paper, equation 3)."""
        rows = batch.row
        losses, weights, kept = self.judge(outputs, batch, rows, batch.label)
        # A copy, because a tensor that a loader's worker shares keeps a file
        # descriptor open until the epoch's end.
        self.tally.seen.append((rows.clone(), *kept))
        loss = gated_mean(losses, weights)
        if "anchor" in self.modules:
            encoder = unwrapped(self.modules.encoder)
            loss = loss + self.modules.anchor(encoder.network)
        return loss

    def judge(
        self,
        outputs: torch.Tensor,
        batch: PaddedBatch,
        rows: torch.Tensor,
        labels: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """Returns losses (batch,), their weights, and tensors for the tally.

        The tally keeps the losses that the gate judged, the gate's selection,
        the corrected labels and the votes, each (batch,).
        """
        losses = self.modules.aam(outputs, labels)
        judged = losses.detach()
        weights = self.modules.gate(judged)
        if "given" in self.modules:
            weights = self.modules.given(rows, weights)
        selected = weights > 0.5
        self.count(outputs, labels, selected)
        corrected = votes = torch.full_like(labels, -1)
        if "correction" in self.modules:
            clean = self.clean_cosines(batch)
            corrected = self.modules.correction(rows, clean, selected)
            votes = self.modules.correction.votes[rows, 0]
            changed = corrected >= 0
            weights = weights.masked_fill(changed, 1)
            labels = torch.where(changed, corrected, labels)
            losses = self.modules.aam(outputs, labels)
        return losses, weights, (judged, selected, corrected, votes)

    def count(
        self,
        cosines: torch.Tensor,
        labels: torch.Tensor,
        selected: torch.Tensor,
    ) -> None:
        """Counts a batch's selected utterances, and the correct among them."""
        correct = (cosines.argmax(1) == labels) & selected
        self.tally.add(correct=correct.sum(), selected=selected.sum())

    def judged_labels(self, labels: np.ndarray) -> np.ndarray:
        """Returns the labels that the gate judges: the clusters' (N,)."""
        return labels

    def epoch_summary(self) -> dict[str, float]:
        """Returns accuracy over the selected, their share and the threshold."""
        seen = [part.numpy() for part in self.tally.join_seen()]
        last = last_visits(seen[0])
        rows, losses, selected, corrected, votes = (part[last] for part in seen)
        self.tally.seen = []
        if "correction" in self.modules:
            self.modules.correction.end_epoch(rows, votes)
        # With `steps_per_epoch` an epoch may visit few of many utterances.
        before = np.setdiff1d(self.tally.last.get("passed", rows[:0]), rows)
        tau = float(self.modules.gate.tau)
        self.modules.gate.end_epoch(losses)
        self.tally.last = {
            "rows": rows,
            "losses": losses,
            "selected": selected,
            "corrected": corrected,
            "passed": np.union1d(before, rows[selected]),
            "tau": tau,
        }
        counts = self.tally.total()
        n_selected = max(int(counts["selected"]), 1)
        return {
            "accuracy": float(counts["correct"]) / n_selected,
            "selected_share": float(np.mean(selected)),
            "corrected_share": float(np.mean(corrected >= 0)),
            "tau": tau,
        }


def last_visits(rows: np.ndarray) -> np.ndarray:
    """Returns the indices (n,) of each row's last occurrence in rows (N,)."""
    _, places = np.unique(rows[::-1], return_index=True)
    return np.sort(len(rows) - 1 - places)
