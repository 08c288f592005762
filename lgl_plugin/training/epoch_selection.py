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

import numpy as np
import torch
from sklearn.metrics import silhouette_score
from speechbrain.utils.checkpoints import (
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)

from lgl_plugin.clustering.kmeans import TorchKMeans
from lgl_plugin.clustering.vectors import normalised
from lgl_plugin.metrics.agreement import ami
from lgl_plugin.metrics.error_rates import eer

# The figure of an epoch's record that a criterion reads, and whether a higher
# one is better.
CRITERIA = {
    "pseudo_trials": ("pseudo_eer", False),
    "contrastive": ("contrastive_accuracy", True),
    "loss": ("loss", False),
    "silhouette": ("silhouette", True),
    "agreement": ("agreement", True),
    "last": ("epoch", True),
    "trials": ("eer", False),
}
# Utterances that are clustered at each epoch for the silhouette.
SAMPLE = 1000


def pseudo_trial_eer(first, second):
    """Equal error rate over all pairs of held-out crops.

    Arguments
    ---------
    first, second : numpy.ndarray
        Embeddings of the two crops of each utterance, shape
        (n_utterances, dim), float32.

    Returns
    -------
    float
        As a fraction, 0 to 1.

    Example
    -------
    >>> pseudo_trial_eer(np.eye(3), np.eye(3))
    0.0
    """
    scores = normalised(first) @ normalised(second).T
    same = np.eye(len(scores), dtype=bool)
    return eer(scores.ravel(), same.ravel())[0]


def contrastive_accuracy(first, second):
    """Share of held-out crops whose nearest is the other of their utterance.

    Arguments
    ---------
    first, second : numpy.ndarray
        Embeddings of the two crops of each utterance, shape
        (n_utterances, dim), float32.

    Returns
    -------
    float
        From 0 to 1.

    Example
    -------
    >>> contrastive_accuracy(np.eye(3), np.eye(3))
    1.0
    """
    crops = normalised(np.concatenate([first, second]))
    scores = crops @ crops.T
    np.fill_diagonal(scores, -np.inf)
    partner = np.roll(np.arange(len(crops)), len(first))
    return float((scores.argmax(axis=1) == partner).mean())


@register_checkpoint_hooks
class ClusterFigures:
    """How well the same utterances cluster, from one epoch to the next.

    A checkpoint keeps the clusters that the next ones are compared with.

    Arguments
    ---------
    device : str
        Where to cluster.

    Example
    -------
    >>> rng = np.random.default_rng(0)
    >>> vectors = np.repeat(np.eye(3), 10, axis=0)
    >>> vectors += 0.1 * rng.normal(size=vectors.shape)
    >>> figures = ClusterFigures()
    >>> figures(vectors)["agreement"] is None
    True
    >>> figures(vectors)["agreement"]
    1.0
    """

    def __init__(self, device="cpu"):
        self.device = device
        self.before = None

    def __call__(self, vectors):
        """Clusters an epoch's embeddings.

        Arguments
        ---------
        vectors : numpy.ndarray
            Embeddings (N, dim) of the same utterances at every call. A tenth
            as many clusters are made, as the number of speakers is unknown.

        Returns
        -------
        dict
            `silhouette`, mean by cosine distance (Rousseeuw 1987), and
            `agreement`, adjusted mutual information with the clusters of the
            call before, None at the first.
        """
        n_clusters = max(2, len(vectors) // 10)
        kmeans = TorchKMeans(n_clusters, n_iterations=10, device=self.device)
        labels = kmeans(vectors).labels
        before, self.before = self.before, labels
        return {
            "silhouette": float(
                silhouette_score(vectors, labels, metric="cosine")
            ),
            "agreement": None if before is None else ami(before, labels),
        }

    @mark_as_saver
    def save(self, path):
        """Writes the clusters of the latest call, if there are any."""
        known = self.before is not None
        torch.save(torch.from_numpy(self.before) if known else None, path)

    @mark_as_loader
    def load(self, path, end_of_epoch=True):
        """Reads what `save` wrote."""
        before = torch.load(path, map_location="cpu", weights_only=True)
        self.before = None if before is None else before.numpy()


def criterion(record, name):
    """What makes an epoch the best: the lowest of these numbers.

    Arguments
    ---------
    record : dict
        The epoch's figures.
    name : str
        One of `CRITERIA`.

    Returns
    -------
    float
        Infinite where the figure is missing or not finite.

    Example
    -------
    >>> criterion({"silhouette": 0.25}, "silhouette")
    -0.25
    >>> criterion({"agreement": None}, "agreement")
    inf
    """
    figure, higher_is_better = CRITERIA[name]
    value = record.get(figure)
    if value is None or not math.isfinite(value):
        return math.inf
    return -value if higher_is_better else value


def check_criterion(name):
    """Raises ValueError if the yaml's `selection` is not one of `CRITERIA`.

    Example
    -------
    >>> check_criterion("eer")
    Traceback (most recent call last):
    ValueError: selection: eer is not known; choose pseudo_trials, \
contrastive, loss, silhouette, agreement, last or trials.
    """
    if name not in CRITERIA:
        *some, final = CRITERIA
        raise ValueError(
            f"selection: {name} is not known; choose "
            f"{', '.join(some)} or {final}."
        )
