"""Agreement of two labellings: mutual information and purity."""

import numpy as np
from scipy.sparse import coo_array
from scipy.special import gammaln
from scipy.stats import entropy
from sklearn.metrics import mutual_info_score, normalized_mutual_info_score


def nmi(true, pseudo):
    """Normalised mutual information of speakers and pseudo-labels.

    Normalised by the arithmetic mean of both entropies (paper section 5.3).
    It is biased upwards when clusters are small: many random clusters score
    well above 0. `ami` is not.

    Arguments
    ---------
    true : array-like, (N,), str or int
        The speaker of each utterance; "" or negative where not known.
    pseudo : array-like, (N,), str or int
        The pseudo-label of each utterance.

    Returns
    -------
    float
        From 0 (independent) to 1 (the same partition).

    Raises
    ------
    ValueError
        When the lengths differ or no utterance has a true label.

    Example
    -------
    >>> nmi(["ann", "ann", "bob", "bob"], [7, 7, 3, 3])
    1.0
    """
    true, pseudo, _ = _labelled(true, pseudo)
    return float(normalized_mutual_info_score(true, pseudo))


def ami(true, pseudo):
    """Mutual information adjusted for chance.

    Random clusters score 0 whatever their number (Vinh et al., 2010);
    normalised by the arithmetic mean of both entropies. The value is that of
    scikit-learn's `adjusted_mutual_info_score`, which takes minutes for
    6,000 clusters of a million utterances; this takes a second.

    Arguments
    ---------
    true : array-like, (N,), str or int
        The speaker of each utterance; "" or negative where not known.
    pseudo : array-like, (N,), str or int
        The pseudo-label of each utterance.

    Returns
    -------
    float
        1 for the same partition, about 0 for random ones, at times below 0.

    Raises
    ------
    ValueError
        When the lengths differ or no utterance has a true label.

    Example
    -------
    >>> ami(["ann", "ann", "bob", "bob"], [7, 7, 3, 3])
    1.0
    """
    true, pseudo, _ = _labelled(true, pseudo)
    _, true = np.unique(true, return_inverse=True)
    _, pseudo = np.unique(pseudo, return_inverse=True)
    counts = _contingency(true, pseudo)
    sizes = counts.sum(axis=1), counts.sum(axis=0)
    expected = _expected_information(*sizes)
    average = (entropy(sizes[0]) + entropy(sizes[1])) / 2
    # One group only, or one utterance per group, on both sides: partitions
    # of these sizes cannot differ. The margin is that of `gammaln`.
    if average - expected <= 1e-9 * average:
        return 1.0
    information = mutual_info_score(None, None, contingency=counts)
    return float((information - expected) / (average - expected))


def purity(true, pseudo):
    """Share of utterances that belong to the main speaker of their cluster.

    It grows with the number of clusters and is 1 when each holds one
    utterance, so it compares clusterings of the same size only.

    Arguments
    ---------
    true : array-like, (N,), str or int
        The speaker of each utterance; "" or negative where not known.
    pseudo : array-like, (N,), str or int
        The pseudo-label of each utterance.

    Returns
    -------
    float
        In (0, 1].

    Raises
    ------
    ValueError
        When the lengths differ or no utterance has a true label.

    Example
    -------
    >>> purity(["ann", "ann", "bob", "bob"], [0, 0, 0, 1])
    0.75
    """
    true, pseudo, _ = _labelled(true, pseudo)
    _, true = np.unique(true, return_inverse=True)
    _, pseudo = np.unique(pseudo, return_inverse=True)
    main = _contingency(true, pseudo).max(axis=1).toarray()
    return float(main.sum() / len(true))


def _labelled(true, pseudo):
    """Both labels where the speaker is known, and the mask of these."""
    true, pseudo = np.asarray(true), np.asarray(pseudo)
    if true.ndim != 1 or true.shape != pseudo.shape:
        raise ValueError(
            "true and pseudo need one label per utterance each, got shapes "
            f"{true.shape} and {pseudo.shape}"
        )
    # Comparing integers with "" is an error.
    known = true != "" if true.dtype.kind in "UO" else true >= 0
    if not known.any():
        raise ValueError(
            f"none of the {len(true)} utterances has a true label: the "
            "analysis needs the manifest's spk_id column filled"
        )
    return true[known], pseudo[known], known


def _contingency(true, pseudo):
    """Utterances per cluster (rows) and speaker (columns), from indices."""
    counts = coo_array((np.ones(len(true), np.int64), (pseudo, true)))
    return counts.tocsr()


def _expected_information(sizes, others):
    """Mean mutual information, in nats, of random partitions of given sizes.

    An overlap of k between groups of a and b of the n utterances has
    hypergeometric probability. Groups of equal size are done once: there are
    a few hundred distinct sizes where there are thousands of groups.
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
