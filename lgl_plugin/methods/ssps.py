"""Stage I continued with positives of other utterances."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import speechbrain as sb
import torch
from speechbrain.dataio.batch import PaddedBatch
from torch import Tensor

from lgl_plugin.dataio.partners import Partners
from lgl_plugin.methods.stage1 import Stage1Brain
from lgl_plugin.nnet.queue import EmbeddingQueue


class SSPSBrain(Stage1Brain):
    """Stage I by any method, with self-supervised positive sampling.

    Lepage and Dehak 2025; for DINO, Han et al. 2023 (CA-DINO). The two crops of
    an utterance share speaker, room and microphone, and a network may tell
    utterances by the latter. Here the second crop is of another utterance,
    from a cluster that may share its speaker. Utterances of one cluster are no
    negatives of each other; in sslsv they stay, at a cosine of 0. There, a
    positive is an embedding that a queue holds, without a gradient.

    After an epoch `tally.last` holds `rows`, the manifest rows of the
    utterances in the order seen, and `positives`, those of their partners, -1
    where there was none.

    Arguments
    ---------
    *args, **kwargs
        Those of `Stage1Brain`. A batch's `partner` is the row that the second
        crop is of.
    group : callable
        Takes the encoder at an epoch's start; on every process it returns
        clusters, sources and rows as `Partners.regroup` takes them.
    partners : lgl_plugin.dataio.partners.Partners
        What the training data draws from.
    cluster_epochs : int
        For how many epochs clusters hold until it is called again.
    """

    def __init__(
        self,
        *args: Any,
        group: Callable[[torch.nn.Module], tuple],
        partners: Partners,
        cluster_epochs: int = 1,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.group = group
        self.partners = partners
        self.cluster_epochs = cluster_epochs
        self.clusters = partners.clusters.to(self.device)
        self.checkpointer.add_recoverable("partners", partners)

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
            self.partners.regroup(*self.group(self.modules.encoder))
            # A method's queue is numbered by the clusters before.
            for part in self.method.modules():
                if isinstance(part, EmbeddingQueue):
                    part.clear()
        if stage == sb.Stage.TRAIN:
            self.clusters = self.partners.clusters.to(self.device)
        super().on_stage_start(stage, epoch)
        if grouping:  # else the time left would be too short
            self.tally.started = began

    def groups(self, batch: PaddedBatch) -> Tensor:
        """Numbers what the crops (2, batch) are of: a cluster, if in one."""
        rows = torch.stack([batch.row, batch.partner])
        clusters = self.clusters[rows]
        groups = torch.where(clusters < 0, rows, len(self.clusters) + clusters)
        size = len(batch.row)
        alike = (groups[0, :, None] == groups[0]).sum() - size
        self.tally.add(alike_share=alike / (size * (size - 1)))
        self.tally.seen.append(tuple(rows))
        return groups

    def epoch_summary(self) -> dict[str, float]:
        """Returns the method's figures and what the clusters did.

        `substituted_share` is that of utterances whose second crop was of
        another, `alike_share` that of pairs of a batch that are of one cluster.
        """
        rows, partners = (part.numpy() for part in self.tally.join_seen())
        self.tally.seen = []
        found = partners != rows
        self.tally.last = {
            "rows": rows,
            "positives": np.where(found, partners, -1),
        }
        counts = self.tally.total()
        return {
            **super().epoch_summary(),
            # Of all steps: it is known before their loss is.
            "alike_share": float(counts["alike_share"] / counts["batches"]),
            "substituted_share": float(found.mean()),
        }
