"""Equal error rate and detection cost of scores, without loops."""

import numpy as np


def eer(scores, labels):
    """Equal error rate, exact.

    The operating points are all the ways to cut the distinct scores in two;
    equal scores fall on the same side. Between two neighbouring points both
    error rates are interpolated linearly, and the EER is where they are
    equal: the crossing of the ROC, drawn with straight lines, with the
    diagonal from (0, 1) to (1, 0).

    Arguments
    ---------
    scores : array-like, (T,), float
        Higher means more likely the same speaker.
    labels : array-like, (T,), bool
        True for a target trial.

    Returns
    -------
    rate : float
        From 0 to 1.
    threshold : float
        Midway between two neighbouring scores, where the two error rates
        differ least; accept what scores above it.

    Raises
    ------
    ValueError
        When a score is not finite, a class is missing or lengths differ.

    Example
    -------
    >>> rate, threshold = eer([0.9, 0.7, 0.4, 0.1], [True, True, False, False])
    >>> rate, round(threshold, 6)
    (0.0, 0.55)
    """
    cuts, p_miss, p_fa = _operating_points(scores, labels)
    rate, nearest = _crossing(p_miss, p_fa)
    return rate, float(cuts[nearest])


def min_dcf(scores, labels, p_target, c_miss=1.0, c_fa=1.0):
    """Minimum of the normalised detection cost, exact.

    The cost c_miss * p_target * P_miss + c_fa * (1 - p_target) * P_fa at the
    best threshold, divided by that of the better system that does not listen
    (NIST SRE and VoxCeleb's convention): min(c_miss * p_target, c_fa *
    (1 - p_target)). SpeechBrain's `minDCF` leaves out the division.

    Arguments
    ---------
    scores : array-like, (T,), float
        Higher means more likely the same speaker.
    labels : array-like, (T,), bool
        True for a target trial.
    p_target : float
        Prior probability of a target trial, between 0 and 1.
    c_miss : float
        Cost of rejecting a target.
    c_fa : float
        Cost of accepting a non-target.

    Returns
    -------
    float
        From 0 to 1.

    Raises
    ------
    ValueError
        When a score is not finite, a class is missing, lengths differ, or
        the prior or a cost is out of range.

    Example
    -------
    >>> min_dcf([0.9, 0.4, 0.7, 0.1], [True, True, False, False], 0.5)
    0.5
    """
    if not (0 < p_target < 1 and c_miss > 0 and c_fa > 0):
        raise ValueError(
            "p_target must be between 0 and 1 and both costs positive, got "
            f"p_target={p_target}, c_miss={c_miss}, c_fa={c_fa}"
        )
    _, p_miss, p_fa = _operating_points(scores, labels)
    miss, false_alarm = c_miss * p_target, c_fa * (1 - p_target)
    cost = miss * p_miss + false_alarm * p_fa
    return float(cost.min() / min(miss, false_alarm))


def _operating_points(scores, labels):
    """Both error rates for each way to cut the distinct scores in two.

    Returns cuts, p_miss and p_fa, (M + 1,) float64 each for M distinct
    scores, from accepting all to rejecting all: accepted is what scores
    above the cut.
    """
    _, cuts, missed, refused = _ordered(scores, labels)
    return cuts, missed / missed[-1], 1 - refused / refused[-1]


def _ordered(scores, labels):
    """Sorts trials and counts what is rejected at each cut.

    Returns the trials' order by score, (T,), and for each of M + 1 cuts its
    place, float64, and how many target and non-target trials it rejects.
    """
    scores = np.asarray(scores, np.float64)
    labels = np.asarray(labels, bool)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(
            "scores and labels need one value per trial each, got shapes "
            f"{scores.shape} and {labels.shape}"
        )
    finite = np.isfinite(scores)
    if not finite.all():
        raise ValueError(
            f"{(~finite).sum()} of {len(scores)} scores are not finite, the "
            f"first that of trial {np.argmin(finite) + 1}"
        )
    targets = labels.sum()
    if targets in (0, len(labels)):
        raise ValueError(
            f"error rates need both classes, got {targets} target trials "
            f"among {len(labels)}"
        )
    order = np.argsort(scores)
    scores, labels = scores[order], labels[order]
    last = np.append(scores[1:] != scores[:-1], True)  # of equal scores
    rejected = np.append(0, np.flatnonzero(last) + 1)
    missed = np.append(0, np.cumsum(labels))[rejected]
    distinct = scores[last]
    middle = (distinct[1:] + distinct[:-1]) / 2
    cuts = np.hstack([-np.inf, middle, distinct[-1]])
    return order, cuts, missed, rejected - missed


def _crossing(p_miss, p_fa):
    """The equal error rate, and the cut where the two differ least."""
    gap = p_miss - p_fa  # grows from -1 to 1
    after = int(np.argmax(gap >= 0))
    before = after - 1
    weight = gap[before] / (gap[before] - gap[after])
    rate = p_miss[before] + weight * (p_miss[after] - p_miss[before])
    return float(rate), after if gap[after] <= -gap[before] else before
