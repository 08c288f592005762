"""Holds utterances out; checks batch and cluster sizes for the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from speechbrain.utils.logger import get_logger

from lgl_plugin.dataio.manifest import Manifest, held_out
from lgl_plugin.runs.schema import Settings, Stage2Settings
from lgl_plugin.utils.distributed import world_size

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

logger = get_logger(__name__)


def whole_batch(settings: Settings) -> int:
    """Returns the batch size summed over all processes."""
    return settings.dataloader_options.batch_size * world_size()


def split_rows(
    settings: Settings, n_utterances: int, labelled: ArrayLike = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the rows to train on and those to hold out, none of `labelled`.

    Raises ValueError, with the setting's name, if the rows to train on do not
    fill a batch of all processes.
    """
    rows, held = held_out(
        n_utterances, settings.held_out_share, settings.seed, labelled
    )
    batch_size, n_train = whole_batch(settings), len(rows)
    if n_train < 2:
        raise ValueError(
            f"{n_utterances} usable utterances are too few: one at least "
            "is held out, and two make the smallest batch"
        )
    if batch_size > n_train:
        raise ValueError(
            f"batch_size: {batch_size} is more than the {n_train} utterances "
            f"to train on ({n_utterances}, less those held out). Lower "
            "batch_size."
        )
    steps_per_epoch(settings, batch_size, n_train)
    return rows, held


def steps_per_epoch(
    settings: Settings, batch_size: int, n_utterances: int
) -> int:
    """Returns the number of steps of an epoch on `n_utterances`.

    Raises ValueError if gradients are accumulated over more steps than an epoch
    has: each epoch begins without gradients, so the weights would never change.
    """
    steps = settings.steps_per_epoch or n_utterances // batch_size
    if steps < (settings.grad_accumulation_factor or 1):
        raise ValueError(
            "grad_accumulation_factor: "
            f"{settings.grad_accumulation_factor} is more than the "
            f"{steps} steps of an epoch, so nothing would be trained. "
            "Lower it, or train fewer phases in another --output_folder."
        )
    return steps


def warn_of_short(settings: Settings, manifest: Manifest) -> None:
    """Warns if most utterances are shorter than a crop and thus repeated."""
    crop, durations = settings.crop_seconds, manifest.durations
    number = int((durations < crop).sum())
    if 2 * number > len(durations):
        logger.warning(
            "crop_seconds: %g s are longer than %d of %d utterances, which "
            "are repeated to fill a crop. Their median is %.1f s: take a "
            "crop_seconds below that",
            *(crop, number, len(durations), float(np.median(durations))),
        )


def check_clusters(settings: Stage2Settings, n_utterances: int) -> None:
    """Refuses clusters that `n_utterances` cannot make, before any work.

    Arguments
    ---------
    settings : lgl_plugin.runs.schema.Stage2Settings
        `cluster`, `cluster_twice` and `min_cluster_size` are read.
    n_utterances : int
        Number of utterances to cluster.

    Raises
    ------
    ValueError
        If the clusters are impossible; the message names the setting.

    Example
    -------
    >>> import types
    >>> from lgl_plugin.clustering.kmeans import TorchKMeans
    >>> settings = types.SimpleNamespace(
    ...     cluster=TorchKMeans(8), cluster_twice=False, min_cluster_size=1
    ... )
    >>> check_clusters(settings, 8)
    """
    settings.cluster.check(n_utterances)
    check_twice(settings)
    if settings.min_cluster_size > n_utterances:
        raise ValueError(
            f"min_cluster_size: {settings.min_cluster_size} is more than the "
            f"{n_utterances} utterances, so no cluster would be left. Lower "
            "it."
        )


def check_twice(settings: Settings, prefix: str = "") -> None:
    """Refuses `cluster_twice` with a clustering by a threshold.

    PLDA changes the cosines, so the threshold would not fit the second
    clustering.
    """
    cluster = getattr(settings, f"{prefix}cluster")
    name = f"{prefix}cluster_twice"
    if getattr(settings, name) and not hasattr(cluster, "n_clusters"):
        raise ValueError(
            f"{name}: {type(cluster).__name__} has no number of clusters, and "
            "its threshold would not fit the second clustering. Set "
            f"{name} to False, or take another {prefix}cluster."
        )
