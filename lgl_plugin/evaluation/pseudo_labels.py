"""Pseudo-labels and gates against the true speakers, after the fact.

How well the clusters match the speakers (NMI, AMI, purity), which utterances
carry a reliable pseudo-label, and how well a gate finds those. True labels
serve to understand a run once it is done; no training decision may read them.

Labels are arrays or lists of strings or integers, one per utterance. An
utterance whose true label is empty or a negative number is left out.
"""

import numpy as np
from scipy.sparse import csr_array, eye_array, hstack
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from lgl_plugin.metrics.agreement import (
    _contingency,
    _labelled,
    ami,
    nmi,
    purity,
)


def hungarian_mapping(true, pseudo):
    """The one-to-one mapping from clusters to speakers that agrees most.

    The optimal assignment of paper section 3, found on the sparse table of
    counts. The numbers of clusters and speakers may differ. Where several
    mappings agree on equally many utterances, one of them is returned.

    Arguments
    ---------
    true : array-like, (N,), str or int
        The speaker of each utterance; "" or negative where not known.
    pseudo : array-like, (N,), str or int
        The pseudo-label of each utterance.

    Returns
    -------
    dict
        Each pseudo-label's speaker; -1 for a cluster left without one.

    Raises
    ------
    ValueError
        When the lengths differ or no utterance has a true label.

    Example
    -------
    >>> hungarian_mapping(["ann", "ann", "bob", "bob"], [5, 5, 5, 8])
    {5: 'ann', 8: 'bob'}
    >>> hungarian_mapping(["ann", "ann", "ann"], [5, 5, 8])
    {5: 'ann', 8: -1}
    """
    true, pseudo, _ = _labelled(true, pseudo)
    speakers, true = np.unique(true, return_inverse=True)
    clusters, pseudo = np.unique(pseudo, return_inverse=True)
    speakers = speakers.tolist()
    return {
        cluster: speakers[speaker] if speaker >= 0 else -1
        for cluster, speaker in zip(
            clusters.tolist(), _assign(true, pseudo).tolist(), strict=True
        )
    }


def reliable(true, pseudo):
    """Which utterances carry a reliable pseudo-label.

    Reliable means that the cluster is mapped to the utterance's own speaker
    by the Hungarian algorithm (paper section 3).

    Arguments
    ---------
    true : array-like, (N,), str or int
        The speaker of each utterance; "" or negative where not known.
    pseudo : array-like, (N,), str or int
        The pseudo-label of each utterance.

    Returns
    -------
    numpy.ndarray, (N,), bool
        False where the speaker is not known.

    Raises
    ------
    ValueError
        When the lengths differ or no utterance has a true label.

    Example
    -------
    >>> reliable(["ann", "ann", "bob", "bob"], [5, 5, 5, 8]).tolist()
    [True, True, False, True]
    """
    true, pseudo, known = _labelled(true, pseudo)
    _, true = np.unique(true, return_inverse=True)
    _, pseudo = np.unique(pseudo, return_inverse=True)
    mask = np.zeros(len(known), bool)
    mask[known] = _assign(true, pseudo)[pseudo] == true
    return mask


def gate_quality(selected, reliable):
    """How well a gate finds the reliable utterances.

    Arguments
    ---------
    selected : array-like, (N,), bool
        Which utterances the gate lets through.
    reliable : array-like, (N,), bool
        Which utterances have a reliable pseudo-label.

    Returns
    -------
    dict
        `precision`: share of the selected that are reliable; `recall`: share
        of the reliable that are selected; `share`: share of all that are
        selected. 0.0 where nothing is selected or nothing is reliable.

    Raises
    ------
    ValueError
        When the lengths differ or are zero.

    Example
    -------
    >>> quality = gate_quality([1, 1, 0, 0], [1, 0, 1, 1])
    >>> [round(value, 3) for value in quality.values()]
    [0.5, 0.333, 0.5]
    """
    selected = np.asarray(selected, bool)
    reliable = np.asarray(reliable, bool)
    if selected.shape != reliable.shape or not selected.size:
        raise ValueError(
            "selected and reliable need one value per utterance each, got "
            f"shapes {selected.shape} and {reliable.shape}"
        )
    both = (selected & reliable).sum()
    return {
        "precision": float(both / max(selected.sum(), 1)),
        "recall": float(both / max(reliable.sum(), 1)),
        "share": float(selected.mean()),
    }


def clustering_report(true, pseudo, selected=None):
    """All that the true labels say about one iteration.

    Arguments
    ---------
    true : array-like, (N,), str or int
        The speaker of each utterance; "" or negative where not known.
    pseudo : array-like, (N,), str or int
        The pseudo-label of each utterance.
    selected : array-like, (N,), bool, optional
        Which utterances the gate lets through.

    Returns
    -------
    dict
        `nmi`, `ami`, `purity`, `reliable_share` over the utterances with a
        true label, `unlabelled`, the count of the others; with `selected`
        also `nmi_selected` and `ami_selected` (paper section 5.3; 0.0 where
        nothing is selected), `gate_precision` and `gate_recall`.

    Raises
    ------
    ValueError
        When the lengths differ or no utterance has a true label.

    Example
    -------
    >>> report = clustering_report(
    ...     ["ann", "ann", "bob", "bob", ""],
    ...     [5, 5, 5, 8, 8],
    ...     selected=[True, True, False, True, True],
    ... )
    >>> report["reliable_share"], report["unlabelled"]
    (0.75, 1)
    >>> report["nmi_selected"], report["gate_precision"], report["gate_recall"]
    (1.0, 1.0, 1.0)
    """
    true, pseudo, known = _labelled(true, pseudo)
    # Integers once, so that no measure sorts a million strings again.
    _, true = np.unique(true, return_inverse=True)
    _, pseudo = np.unique(pseudo, return_inverse=True)
    trusted = reliable(true, pseudo)
    report = {
        "nmi": nmi(true, pseudo),
        "ami": ami(true, pseudo),
        "purity": purity(true, pseudo),
        "reliable_share": float(trusted.mean()),
        "unlabelled": int((~known).sum()),
    }
    if selected is not None:
        selected = np.asarray(selected, bool)
        if selected.shape != known.shape:
            raise ValueError(
                f"selected has shape {selected.shape} for "
                f"{len(known)} utterances"
            )
        selected = selected[known]
        quality = gate_quality(selected, trusted)
        for name, measure in (("nmi", nmi), ("ami", ami)):
            report[f"{name}_selected"] = (
                measure(true[selected], pseudo[selected])
                if selected.any()
                else 0.0
            )
        report["gate_precision"] = quality["precision"]
        report["gate_recall"] = quality["recall"]
    return report


def _assign(true, pseudo):
    """The speaker's index of each cluster, from indices; -1 for none."""
    counts = _contingency(true, pseudo)
    # The solver minimises, gives every row a column and reads a stored zero
    # as no edge: costs are positive, and each cluster has a column of its
    # own to fall back on, worth no utterance.
    none = counts.max() + 1
    costs = csr_array(
        (none - counts.data, counts.indices, counts.indptr), counts.shape
    )
    fallback = none * eye_array(counts.shape[0], dtype=np.int64)
    costs = hstack([costs, fallback], format="csr")
    _, speaker = min_weight_full_bipartite_matching(costs)
    return np.where(speaker < counts.shape[1], speaker, -1)
