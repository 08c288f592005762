"""Agreement of two labellings by their mutual information."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from scipy.special import gammaln
from scipy.stats import entropy
from sklearn.metrics import mutual_info_score
from sklearn.metrics.cluster import contingency_matrix


def ami(true: npt.ArrayLike, pseudo: npt.ArrayLike) -> float:
    """Returns the mutual information adjusted for chance.

    Random clusters score 0 whatever their number (Vinh et al. 2010). The value
    equals that of scikit-learn's `adjusted_mutual_info_score`, which takes
    minutes for 6,000 clusters of a million utterances. This function takes a
    second.

    Arguments
    ---------
    true, pseudo : array-like, (N,), str or int
        Speaker ("" or negative where not known) and pseudo-label of each
        utterance.

    Returns
    -------
    float
        1 for the same partition, about 0 for random ones, at times below 0.

    Raises
    ------
    ValueError
        If the lengths differ or no utterance has a true label.

    Example
    -------
    >>> ami(["ann", "ann", "bob", "bob"], [7, 7, 3, 3])
    1.0
    """
    true, pseudo, _ = with_known_speaker(true, pseudo)
    counts = contingency(true, pseudo)
    sizes = counts.sum(axis=1), counts.sum(axis=0)
    expected = _expected_information(*sizes)
    average = (entropy(sizes[0]) + entropy(sizes[1])) / 2
    # With a single group, or one utterance per group, on both sides, the
    # partitions cannot differ and the ratio below would be 0 / 0. The margin
    # is the rounding error of `gammaln`.
    if average - expected <= 1e-9 * average:
        return 1.0
    information = mutual_info_score(None, None, contingency=counts)
    return float((information - expected) / (average - expected))


def with_known_speaker(
    true: npt.ArrayLike, pseudo: npt.ArrayLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns both labels of utterances with known speaker, and their mask.

    The mask is bool (N,). Raises ValueError if the lengths differ or no speaker
    is known.
    """
    true, pseudo = np.asarray(true), np.asarray(pseudo)
    if true.ndim != 1 or true.shape != pseudo.shape:
        raise ValueError(
            "true and pseudo need one label per utterance each, got shapes "
            f"{true.shape} and {pseudo.shape}"
        )
    # The check depends on the type, because numpy raises when integers are
    # compared with "".
    known = true != "" if true.dtype.kind in "UO" else true >= 0
    if not known.any():
        raise ValueError(
            f"none of the {len(true)} utterances has a true label: the "
            "analysis needs the manifest's spk_id column filled"
        )
    return true[known], pseudo[known], known


def contingency(true: np.ndarray, pseudo: np.ndarray) -> csr_array:
    """Returns the utterances per cluster (rows) and speaker (columns)."""
    # 6,000 by 6,000 counts would take 288 MB if dense. scikit-learn may return
    # a sparse matrix, whose sums would be two-dimensional.
    return csr_array(contingency_matrix(pseudo, true, sparse=True))


def _expected_information(sizes: np.ndarray, others: np.ndarray) -> float:
    """Returns the mean mutual information, in nats, of random partitions.

    Groups of a and b of the n utterances overlap in k with hypergeometric
    probability. The loop takes groups of equal size together: thousands of
    groups have only a few hundred distinct sizes.
    """
    n = int(sizes.sum())
    others, other_groups = np.unique(others, return_counts=True)
    factorial = gammaln(np.arange(n + 1) + 1.0)  # logarithms
    total = 0.0
    for a, groups in zip(*np.unique(sizes, return_counts=True), strict=True):
        k = np.arange(min(a, others[-1]) + 1)[:, None]
        k, column = np.nonzero(
            (k >= np.maximum(a + others - n, 1)) & (k <= others)
        )
        b = others[column]
        probability = np.exp(
            factorial[a] + factorial[n - a] + factorial[b] + factorial[n - b]
            - factorial[n] - factorial[k] - factorial[a - k]
            - factorial[b - k] - factorial[n - a - b + k]
        )  # fmt: skip
        information = k / n * np.log(n * k / (a * b))
        total += groups * (other_groups[column] * probability) @ information
    return total
