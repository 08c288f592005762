"""Stage I continued with positives of other utterances."""

import time
from collections.abc import Callable
from typing import Any

import speechbrain as sb
import torch
from torch import Tensor

from lgl_plugin.methods.method import Views
from lgl_plugin.methods.stage1 import Stage1Brain
from lgl_plugin.utils.distributed import concatenated


class SSPSBrain(Stage1Brain):
    """Stage I: SimCLR with self-supervised positive sampling.

    Lepage and Dehak 2025. A further module, positives
    (`pseudo_positives.PseudoPositives`), gives an anchor, in place of its
    own B(b), the embedding of another utterance, from a cluster that may share
    its speaker, if one is held. Utterances of one cluster are no
    negatives of each other; in sslsv they stay, at a cosine of 0. The
    adversarial part keeps the utterance's own views: its pairs are to differ
    in nothing but their augmentation.

    After an epoch `tally.last` holds `rows`, the manifest rows of the anchors
    in the order seen, and `positives`, those that took the place of their
    own, -1 where none did.

    Arguments
    ---------
    *args, **kwargs
        Those of `Stage1Brain`, of the method `SimCLR`.
    group : callable
        Takes the encoder at an epoch's start; on every process it returns
        clusters, sources and rows as `PseudoPositives.regroup` takes them.
    cluster_epochs : int
        For how many epochs clusters hold until it is called again.
    """

    def __init__(
        self,
        *args: Any,
        group: Callable[[torch.nn.Module], tuple],
        cluster_epochs: int = 1,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.group = group
        self.cluster_epochs = cluster_epochs

    def on_stage_start(self, stage, epoch=None) -> None:
        """Clusters the utterances anew where an epoch starts and it is time."""
        began = time.perf_counter()
        # In an epoch that goes on, the checkpoint's clusters hold: the
        # encoder of now would give others.
        grouping = (
            stage == sb.Stage.TRAIN
            and self.step == 0
            and (epoch - 1) % self.cluster_epochs == 0
        )
        if grouping:
            self.modules.positives.regroup(*self.group(self.modules.encoder))
        super().on_stage_start(stage, epoch)
        if grouping:  # else the time left would be too short
            self.tally.started = began

    def substitutes(self, embeddings: Views, rows: Tensor) -> dict[str, Tensor]:
        """Returns what takes the place of B(b), and clusters of both."""
        positives, own = self.modules.positives, embeddings[0][-1]
        chosen, vectors = positives(rows)
        found = chosen >= 0
        positives.queue.add(concatenated(rows), concatenated(own.detach()))
        sources = torch.cat([rows, torch.where(found, chosen, rows)])
        clusters = positives.clusters[sources]
        anchors = clusters[: len(rows)]
        alike = (anchors[:, None] == anchors) & (anchors >= 0)
        others = len(rows) * (len(rows) - 1)
        share = (alike.sum() - (anchors >= 0).sum()) / others
        self.tally.add(alike_share=share)
        self.tally.seen.append((rows, chosen))
        positive = torch.where(found[:, None], vectors, own)
        return {"positive": positive, "clusters": clusters}

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
            # Of all steps: it is known before their loss is.
            "alike_share": float(counts["alike_share"] / counts["batches"]),
            "substituted_share": float((chosen >= 0).mean()),
        }
