"""Choosing an epoch without labels.

Held-out utterances give pseudo-trials: two disjoint crops of one utterance,
each under its own augmentation, are a target trial; crops of two utterances
are a non-target trial. Their equal error rate falls as the encoder learns
voices and rises again when it learns something else. Two utterances of one
speaker do appear as non-targets, but rarely (one pair in about as many as
there are speakers).

How well each criterion picks the epoch that labelled trials would pick is
measured by `recipes/VoxCeleb/LGL/paper.py selection`.
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

# By the name in the yaml: the figure of an epoch's record that a criterion
# reads, and whether a higher one is better.
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

    A checkpoint keeps the clusters that the next ones are compared with.
    """

    def __init__(self, device: str = "cpu"):
        self.device = device
        self.before = None

    def __call__(self, vectors: np.ndarray) -> dict[str, float | None]:
        """Clusters embeddings (N, dim) of the same utterances at every call.

        Returns `silhouette`, the mean by cosine distance (Rousseeuw 1987), and
        `agreement`, the adjusted mutual information with the clusters of the
        call before, None at the first.
        """
        # The number of speakers is unknown.
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
        """Writes the clusters of the latest call, if there are any."""
        known = self.before is not None
        torch.save(torch.from_numpy(self.before) if known else None, path)

    @mark_as_loader
    def load(self, path: str | pathlib.Path, end_of_epoch: bool = True) -> None:
        """Reads what `save` wrote."""
        before = torch.load(path, map_location="cpu", weights_only=True)
        self.before = None if before is None else before.numpy()


def criterion(record: dict, name: str) -> float:
    """Returns an epoch's cost, of which the lowest is the best.

    `name` is one of `CRITERIA`; the cost is infinite where the record lacks
    the figure or it is not finite.
    """
    figure, higher_is_better = CRITERIA[name]
    value = record.get(figure)
    if value is None or not math.isfinite(value):
        return math.inf
    return -value if higher_is_better else value
