"""Makes pseudo-speakers, clusters of utterances, for both stages."""

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
    """Clusters embeddings (N, D), after a back-end that is fitted on them.

    `log_mels` (N, D') are whitened log-mel statistics, which make up a `share`
    of the cosines. With `twice`, the first clusters train a PLDA, which finds
    the directions of the embeddings that separate speakers (`inference.plda`).
    The same clustering then runs again on the projection to these directions.
    The second value is the points that were clustered.
    """
    points = vectors
    if backend is not None:
        # A user's own back-end need not derive from Backend.
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
        first = cluster(points)
        if not twice:
            return first, points
        try:
            plda = fit_plda(vectors, first.labels)
        except PldaError as error:
            logger.warning("Clusters are made once, not twice: %s", error)
            return first, points
        if is_auto:
            cluster.n_clusters = first.n_clusters
        points = plda.projection(vectors)
        if log_mels is not None:
            points = joined(points, log_mels, share)
        return cluster(points), points


def whitened_log_mels(
    store: Embeddings, utterances: Sequence[str]
) -> np.ndarray:
    """Returns the whitened log-mel statistics (N, 160) of utterances.

    An utterance that the store lacks, because its audio could not be read, gets
    zeros.
    """
    row_of = {name: row for row, name in enumerate(store.utterances)}
    rows = np.array([row_of.get(name, -1) for name in utterances])
    statistics = np.array(store.vectors[rows[rows >= 0]])
    result = np.zeros((len(rows), statistics.shape[1]), np.float32)
    result[rows >= 0] = log_mel_whitening().fit_transform(statistics)
    return result
