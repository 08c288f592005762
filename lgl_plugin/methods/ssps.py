"""Stage I continued with positives of other utterances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import speechbrain as sb
import torch
from speechbrain.dataio.batch import PaddedBatch

from lgl_plugin.methods.simclr import SimCLRBrain
from lgl_plugin.utils.distributed import concatenated


class SSPSBrain(SimCLRBrain):
    """Stage I: SimCLR with self-supervised positive sampling.

    Lepage and Dehak 2025. A further module, positives
    (`pseudo_positives.PseudoPositives`), gives an anchor the embedding of
    another utterance, of a cluster that they may share a speaker in, in the
    place of its own B(b), if it holds one. Utterances of one cluster are no
    negatives of each other. The adversarial part keeps the utterance's own
    views: its pairs are to differ in nothing but their augmentation.

    After an epoch `tally.last` holds `rows`, the manifest rows of the anchors
    in the order seen, and `positives`, those that took the place of their
    own, -1 where none did.

    Arguments
    ---------
    *args, **kwargs
        Those of `SimCLRBrain`.
    group : callable
        Takes the encoder at an epoch's start; on every process it returns
        clusters, sources and rows as `PseudoPositives.regroup` takes them.
    """

    def __init__(
        self,
        *args: Any,
        group: Callable[[torch.nn.Module], tuple],
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.group = group

    def on_stage_start(self, stage, epoch=None) -> None:
        """Clusters the utterances anew at an epoch's start."""
        # In an epoch that goes on, the checkpoint's clusters hold: the
        # encoder of now would give others.
        if stage == sb.Stage.TRAIN and self.step == 0:
            self.modules.positives.regroup(*self.group(self.modules.encoder))
        super().on_stage_start(stage, epoch)

    def contrast(
        self, embeddings: torch.Tensor, batch: PaddedBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Contrasts the first view with what took the third's place."""
        positives = self.modules.positives
        anchor, positive = embeddings[0], embeddings[-1]
        # A copy: a tensor that a loader's worker shares keeps a file
        # descriptor open until the epoch's end.
        rows = batch.row.to(self.device, copy=True)
        chosen, vectors = positives(rows)
        found = chosen >= 0
        positives.add(concatenated(rows), concatenated(positive.detach()))
        sources = torch.cat([rows, torch.where(found, chosen, rows)])
        clusters = positives.clusters[sources]
        own = clusters[: len(rows)]
        alike = (own[:, None] == own) & (own >= 0)
        others = len(rows) * (len(rows) - 1)
        self.tally.add(alike=(alike.sum() - (own >= 0).sum()) / others)
        self.tally.seen.append((rows, chosen))
        positive = torch.where(found[:, None], vectors, positive)
        return self.modules.contrastive(anchor, positive, clusters)

    def epoch_summary(self) -> dict[str, float]:
        """Returns SimCLR's figures and what the clusters did.

        `substituted_share` is that of anchors whose positive was replaced,
        `alike_share` that of pairs of a batch that are of one cluster.
        """
        rows, chosen = (part.numpy() for part in self.tally.join_seen())
        self.tally.seen = []
        self.tally.last = {"rows": rows, "positives": chosen}
        counts = self.tally.total()
        return {
            **super().epoch_summary(),
            "substituted_share": float((chosen >= 0).mean()),
            "alike_share": float(counts["alike"] / counts["batches"]),
        }
