"""Choosing an epoch without labels.

Held-out utterances give pseudo-trials: two disjoint crops of one utterance,
each under its own augmentation, are a target trial; crops of two utterances
are a non-target trial. Their equal error rate falls as the encoder learns
voices and rises again when it learns something else. Two utterances of one
speaker do appear as non-targets, but rarely (one pair in about as many as
there are speakers).
"""

import numpy as np

from lgl_plugin.verification import eer

CRITERIA = ("pseudo_trials", "last", "trials")


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
    first = first / np.linalg.norm(first, axis=1, keepdims=True)
    second = second / np.linalg.norm(second, axis=1, keepdims=True)
    scores = first @ second.T
    same = np.eye(len(scores), dtype=bool)
    return eer(scores.ravel(), same.ravel())[0]


def check_criterion(name):
    """Raises ValueError if the yaml's `selection` is not one of `CRITERIA`.

    Example
    -------
    >>> check_criterion("eer")
    Traceback (most recent call last):
    ValueError: selection: eer is not known; choose pseudo_trials, last or \
trials.
    """
    if name not in CRITERIA:
        *some, final = CRITERIA
        raise ValueError(
            f"selection: {name} is not known; choose "
            f"{', '.join(some)} or {final}."
        )
