"""Stage I continued with positives from other utterances (SSPS)."""

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
    an utterance share speaker, room and microphone, so a network may recognise
    utterances by room and microphone. Here the second crop is of another
    utterance, from a cluster that may share the speaker. Utterances of one
    cluster are not each other's negatives. sslsv differs in two points. It
    keeps such negatives, at a cosine of 0. Its positives are embeddings from a
    queue, without a gradient.

    After an epoch `tally.last` has `rows`, the manifest rows of the utterances
    in the order seen, and `positives`, the rows of their partners, -1 for
    utterances without one.

    Arguments
    ---------
    *args, **kwargs
        Those of `Stage1Brain`. A batch's `partner` is the manifest row of the
        second crop.
    group : callable
        Takes the encoder at an epoch's start. Returns, on every process,
        clusters, sources and rows as `Partners.regroup` takes them.
    partners : lgl_plugin.dataio.partners.Partners
        The partners that the training data draws from.
    cluster_epochs : int
        Number of epochs until `group` is called again.
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
        """Clusters the utterances anew every `cluster_epochs` epochs."""
        began = time.perf_counter()
        # A resumed epoch keeps the checkpoint's clusters: the current encoder
        # would give others.
        grouping = (
            stage == sb.Stage.TRAIN
            and self.step == 0
            and (epoch - 1) % self.cluster_epochs == 0
        )
        if grouping:
            self.partners.regroup(*self.group(self.modules.encoder))
            # A method's queue has the numbers of the earlier clusters.
            for part in self.method.modules():
                if isinstance(part, EmbeddingQueue):
                    part.clear()
        if stage == sb.Stage.TRAIN:
            self.clusters = self.partners.clusters.to(self.device)
        super().on_stage_start(stage, epoch)
        if grouping:  # the time left must include the clustering
            self.tally.started = began

    def groups(self, batch: PaddedBatch) -> Tensor:
        """Numbers the groups of the crops (2, batch): cluster, or utterance."""
        rows = torch.stack([batch.row, batch.partner])
        clusters = self.clusters[rows]
        groups = torch.where(clusters < 0, rows, len(self.clusters) + clusters)
        size = len(batch.row)
        n_alike = (groups[0, :, None] == groups[0]).sum() - size
        self.tally.add(alike_share=n_alike / (size * (size - 1)))
        self.tally.seen.append(tuple(rows))
        return groups

    def epoch_summary(self) -> dict[str, float]:
        """Returns the method's figures and those of the clusters.

        `substituted_share` is the share of utterances whose second crop was of
        another utterance. `alike_share` is the share of a batch's pairs that
        are of one cluster.
        """
        rows, partners = (part.numpy() for part in self.tally.join_seen())
        self.tally.seen = []
        substituted = partners != rows
        self.tally.last = {
            "rows": rows,
            "positives": np.where(substituted, partners, -1),
        }
        counts = self.tally.total()
        return {
            **super().epoch_summary(),
            # Divided by all steps, also those whose loss is not finite.
            "alike_share": float(counts["alike_share"] / counts["batches"]),
            "substituted_share": float(substituted.mean()),
        }
