"""Chooses an epoch without labels.

Held-out utterances give pseudo-trials. Two disjoint crops of one utterance,
each with its own augmentation, are a target trial. Crops of two utterances are
a non-target trial. The equal error rate of these trials falls as the encoder
learns voices, and rises again when it learns something else. Non-target trials
of one speaker do occur, but rarely: about one pair in as many as there are
speakers.

`recipes/VoxCeleb/LGL/paper.py selection` measures how well each criterion picks
the epoch that labelled trials would pick.
"""

import math
import pathlib

import numpy as np
import torch
from sklearn.metrics import silhouette_score
from speechbrain.utils.checkpoints import (
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)

from lgl_plugin.clustering.kmeans import TorchKMeans
from lgl_plugin.metrics.agreement import ami

# For each name in the yaml: the figure of an epoch's record that the criterion
# reads, and True if a higher figure is better.
CRITERIA = {
    "pseudo_trials": ("pseudo_eer", False),
    "contrastive": ("contrastive_accuracy", True),
    "loss": ("loss", False),
    "silhouette": ("silhouette", True),
    "agreement": ("agreement", True),
    "last": ("epoch", True),
}
# Utterances that are clustered at each epoch for the silhouette.
SAMPLE = 1000


@register_checkpoint_hooks
class ClusterFigures:
    """Measures how the same utterances cluster, from epoch to epoch.

    A checkpoint contains the last clusters, with which the next are compared.
    """

    def __init__(self, device: str = "cpu"):
        self.device = device
        self.before = None

    def __call__(self, vectors: np.ndarray) -> dict[str, float | None]:
        """Clusters embeddings (N, dim) of the same utterances at every call.

        Returns `silhouette`, the mean by cosine distance (Rousseeuw 1987), and
        `agreement`, the adjusted mutual information with the clusters of the
        previous call, None at the first call.
        """
        # A guess, because the number of speakers is unknown.
        n_clusters = max(2, len(vectors) // 10)
        kmeans = TorchKMeans(n_clusters, n_iterations=10, device=self.device)
        labels = kmeans(vectors).labels
        before, self.before = self.before, labels
        silhouette = silhouette_score(vectors, labels, metric="cosine")
        return {
            "silhouette": float(silhouette),
            "agreement": None if before is None else ami(before, labels),
        }

    @mark_as_saver
    def save(self, path: str | pathlib.Path) -> None:
        """Writes the clusters of the last call, or None before the first."""
        has_clusters = self.before is not None
        torch.save(
            torch.from_numpy(self.before) if has_clusters else None, path
        )

    @mark_as_loader
    def load(self, path: str | pathlib.Path, end_of_epoch: bool = True) -> None:
        """Reads what `save` wrote."""
        before = torch.load(path, map_location="cpu", weights_only=True)
        self.before = None if before is None else before.numpy()


def criterion(record: dict, name: str) -> float:
    """Returns an epoch's cost; the lowest is the best.

    `name` is one of `CRITERIA`. The cost is infinite if the record lacks the
    figure or the figure is not finite.
    """
    figure, higher_is_better = CRITERIA[name]
    value = record.get(figure)
    if value is None or not math.isfinite(value):
        return math.inf
    return -value if higher_is_better else value
