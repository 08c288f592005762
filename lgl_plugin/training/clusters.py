"""Pseudo-speakers: clusters of utterances, for both stages."""

import copy
from collections.abc import Callable, Sequence

import numpy as np
from speechbrain.utils.logger import get_logger

from lgl_plugin.clustering.kmeans import Clustering
from lgl_plugin.clustering.vectors import joined
from lgl_plugin.inference.backends import Backend
from lgl_plugin.inference.log_mel_baseline import log_mel_whitening
from lgl_plugin.inference.plda import PldaError, fit_plda
from lgl_plugin.inference.store import Embeddings
from lgl_plugin.utils.threads import all_cores

logger = get_logger(__name__)


def pseudo_speakers(
    vectors: np.ndarray,
    cluster: Callable[[np.ndarray], Clustering],
    backend: Backend | None = None,
    log_mels: np.ndarray | None = None,
    share: float = 0.0,
    twice: bool = False,
) -> tuple[Clustering, np.ndarray]:
    """Clusters embeddings (N, D), behind a back-end that is fitted on them.

    With `log_mels` (N, D'), whitened log-mel statistics, a `share` of the
    cosines is theirs. With `twice`, the first clusters tell which directions
    of the embeddings know speakers (`inference.plda`), and the same clustering
    runs again behind these. Returns also the points that were clustered.
    """
    points = vectors
    if backend is not None:
        # One of the user's own need not derive from Backend.
        points = backend.fit(vectors)(vectors)
    cluster = copy.copy(cluster)
    is_auto = getattr(cluster, "n_clusters", None) == "auto"
    with all_cores():
        if log_mels is not None:
            if is_auto:
                # With log-mel statistics the estimate would count sessions
                # instead of speakers.
                cluster.n_clusters = cluster(points).n_clusters
            points = joined(points, log_mels, share)
        found = cluster(points)
        if not twice:
            return found, points
        try:
            plda = fit_plda(vectors, found.labels)
        except PldaError as error:
            logger.warning("Clusters are made once, not twice: %s", error)
            return found, points
        if is_auto:
            cluster.n_clusters = found.n_clusters
        points = plda.projection(vectors)
        if log_mels is not None:
            points = joined(points, log_mels, share)
        return cluster(points), points


def whitened_log_mels(
    store: Embeddings, utterances: Sequence[str]
) -> np.ndarray:
    """Returns the whitened log-mel statistics of utterances (N, 160).

    Zero for one that the store lacks, as its audio could not be read then.
    """
    place = {name: row for row, name in enumerate(store.utterances)}
    rows = np.array([place.get(name, -1) for name in utterances])
    statistics = np.array(store.vectors[rows[rows >= 0]])
    found = np.zeros((len(rows), statistics.shape[1]), np.float32)
    found[rows >= 0] = log_mel_whitening().fit_transform(statistics)
    return found
