"""Compares pseudo-labels and gates with the true speakers.

Utterances whose true label is unknown are left out. True labels serve to
understand a run; no training decision may read them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse import csr_array, eye_array, hstack
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from sklearn.metrics import normalized_mutual_info_score as nmi

from lgl_plugin.metrics.agreement import ami, contingency, with_known_speaker


def hungarian_mapping(true: ArrayLike, pseudo: ArrayLike) -> dict:
    """Maps clusters to speakers one to one, so that most utterances agree.

    The optimal assignment of paper section 3. There may be more clusters than
    speakers, or fewer. If several mappings are best, one of them is returned.

    Arguments
    ---------
    true, pseudo : array-like, (N,), str or int
        Speaker ("" or negative where not known) and pseudo-label of each
        utterance.

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
    >>> hungarian_mapping(["ann", "ann", "bob", "ann"], [5, 5, 8, 9])
    {5: 'ann', 8: 'bob', 9: -1}
    """
    true, pseudo, _ = with_known_speaker(true, pseudo)
    speakers, true = np.unique(true, return_inverse=True)
    clusters, pseudo = np.unique(pseudo, return_inverse=True)
    # A list, because np.append would turn -1 into a string.
    speakers = [*speakers.tolist(), -1]
    mapped = [speakers[index] for index in _assign(true, pseudo)]
    return dict(zip(clusters.tolist(), mapped, strict=True))


def reliable(true: ArrayLike, pseudo: ArrayLike) -> np.ndarray:
    """Marks the utterances that carry a reliable pseudo-label.

    Reliable means that the cluster is mapped to the utterance's own speaker
    by `hungarian_mapping` (paper section 3).

    Arguments and errors as of `hungarian_mapping`; a pseudo-label of -1 is
    none.

    Returns
    -------
    numpy.ndarray, (N,), bool
        False where the speaker is not known, or there is no pseudo-label.

    Example
    -------
    >>> reliable(["ann", "ann", "bob", "bob"], [5, 5, 5, 8]).tolist()
    [True, True, False, True]
    """
    true, pseudo, mask = with_known_speaker(true, pseudo)
    labelled = pseudo != -1
    mask[mask] = labelled
    if labelled.any():
        _, true = np.unique(true[labelled], return_inverse=True)
        _, pseudo = np.unique(pseudo[labelled], return_inverse=True)
        mask[mask] = _assign(true, pseudo)[pseudo] == true
    return mask


def clustering_report(
    true: ArrayLike, pseudo: ArrayLike, selected: ArrayLike | None = None
) -> dict[str, float]:
    """Compares one iteration's pseudo-labels and gate with the true labels.

    Arguments
    ---------
    true, pseudo
        As of `hungarian_mapping`, and so are the errors.
    selected : array-like, (N,), bool, optional
        True where the gate selects the utterance.

    Returns
    -------
    dict
        `nmi` (by the mean of both entropies; many small clusters raise it),
        `ami`, `purity` (the share of utterances of their cluster's main
        speaker) and `reliable_share` over the utterances with a true label,
        `unlabelled`, the count of the others; with `selected` also
        `nmi_selected` and `ami_selected` (paper section 5.3), `gate_precision`,
        the share of the selected that are reliable (all 0.0 where nothing is
        selected), and `gate_recall`, the share of the reliable that are
        selected.

    Example
    -------
    >>> report = clustering_report(["ann", "ann", "bob", ""], [5, 5, 5, 8])
    >>> report["purity"] == report["reliable_share"] == 2 / 3
    True
    >>> report["unlabelled"]
    1
    """
    true, pseudo, known = with_known_speaker(true, pseudo)
    # Conversion to integers keeps each measure from sorting a million strings
    # again.
    _, true = np.unique(true, return_inverse=True)
    _, pseudo = np.unique(pseudo, return_inverse=True)
    trusted = reliable(true, pseudo)
    main = contingency(true, pseudo).max(axis=1)
    report = {
        "nmi": float(nmi(true, pseudo)),
        "ami": ami(true, pseudo),
        "purity": float(main.sum() / len(true)),
        "reliable_share": float(trusted.mean()),
        "unlabelled": int((~known).sum()),
    }
    if selected is None:
        return report
    selected = np.asarray(selected, bool)
    if selected.shape != known.shape:
        raise ValueError(
            f"selected has shape {selected.shape} for {len(known)} utterances"
        )
    selected = selected[known]
    # Without labels `ami` raises, and scikit-learn's measure is 1.
    pair = (true[selected], pseudo[selected]) if selected.any() else None
    both = (selected & trusted).sum()
    return report | {
        "nmi_selected": float(nmi(*pair)) if pair else 0.0,
        "ami_selected": ami(*pair) if pair else 0.0,
        "gate_precision": float(both / max(selected.sum(), 1)),
        "gate_recall": float(both / trusted.sum()),  # never 0
    }


def _assign(true, pseudo):
    """Returns each cluster's speaker, both as indices; -1 for none."""
    counts = contingency(true, pseudo)
    # The solver minimises, gives every row a column and reads a stored zero as
    # no edge. So costs are positive, and each cluster has a fallback column of
    # its own, which counts as no utterance.
    none = counts.max() + 1
    costs = csr_array(
        (none - counts.data, counts.indices, counts.indptr), counts.shape
    )
    fallback = none * eye_array(counts.shape[0], dtype=np.int64)
    costs = hstack([costs, fallback], format="csr")
    _, speaker = min_weight_full_bipartite_matching(costs)
    return np.where(speaker < counts.shape[1], speaker, -1)
