"""Draws positives from other utterances of the same cluster, for SSPS."""

import pathlib
import random

import numpy as np
import torch
from speechbrain.utils.checkpoints import (
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)


@register_checkpoint_hooks
class Partners:
    """Utterances from which the second of an utterance's crops may be.

    These partners are of the utterance's own cluster, or of another cluster
    that `regroup` names. The arrays are in shared memory, so that loader
    processes see new clusters. A checkpoint contains the clusters, so that a
    resumed epoch draws the same partners.

    Arguments
    ---------
    n_utterances : int
        Rows of the manifest.

    Attributes
    ---------
    clusters, sources : torch.Tensor
        Each row's cluster and the cluster that its partners come from (N,),
        int64; -1 for none.

    Example
    -------
    >>> partners = Partners(4)
    >>> partners.draw(random.Random(1), 0)  # no clusters yet: itself
    0
    >>> clusters = np.array([0, 0, 1])
    >>> partners.regroup(clusters, clusters, np.arange(3))
    >>> [partners.draw(random.Random(1), row) for row in range(4)]
    [1, 0, 2, 3]
    """

    def __init__(self, n_utterances: int) -> None:
        none = torch.full((n_utterances,), -1)
        self.clusters, self.sources = none, none.clone()
        self.order = none.clone()  # rows, cluster by cluster
        self.place = none.clone()  # of each row in `order`
        self.first = none.clone()  # place in `order` of a row's first partner
        self.end = none.clone()  # one past the place of its last partner
        for shared in vars(self).values():
            shared.share_memory_()

    def regroup(
        self, clusters: np.ndarray, sources: np.ndarray, rows: np.ndarray
    ) -> None:
        """Sets new clusters and sources (n,), int64, of rows (n,)."""
        index = torch.as_tensor(rows)
        for held, new in ((self.clusters, clusters), (self.sources, sources)):
            held.fill_(-1)
            held[index] = torch.from_numpy(new)
        self._sort()

    def _sort(self):
        """Finds each row's partners."""
        sorted_clusters, order = self.clusters.sort(stable=True)
        self.order.copy_(order)
        self.place[order] = torch.arange(len(order))
        first = torch.searchsorted(sorted_clusters, self.sources)
        end = torch.searchsorted(sorted_clusters, self.sources, right=True)
        self.first.copy_(first)
        self.end.copy_(torch.where(self.sources < 0, first, end))

    def draw(self, rng: random.Random, row: int) -> int:
        """Draws one of a row's partners uniformly; the row if it has none."""
        first, end = int(self.first[row]), int(self.end[row])
        place = int(self.place[row])
        within = first <= place < end
        if end - first <= within:
            return row
        drawn = rng.randrange(first, end - within)
        return int(self.order[drawn + (within and drawn >= place)])

    @mark_as_saver
    def save(self, path: str | pathlib.Path) -> None:
        """Writes the clusters."""
        torch.save([self.clusters, self.sources], path)

    @mark_as_loader
    def load(self, path: str | pathlib.Path, end_of_epoch: bool = True) -> None:
        """Reads what `save` wrote."""
        clusters, sources = torch.load(path, weights_only=True)
        self.clusters.copy_(clusters)
        self.sources.copy_(sources)
        self._sort()
