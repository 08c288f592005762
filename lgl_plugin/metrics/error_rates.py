"""Equal error rate and minimum detection cost of scores."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def eer(scores: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[float, float]:
    """Returns the equal error rate, exact, and its threshold.

    Equal scores fall on the same side of a cut. Both error rates are
    interpolated linearly between neighbouring cuts, and the EER is where they
    are equal.

    Arguments
    ---------
    scores, labels : array-like, (T,), float and bool
        Score of each trial, higher for the same speaker; True for a target.

    Returns
    -------
    rate : float
        A fraction, from 0 to 1.
    threshold : float
        Midway between two neighbouring scores, where the two error rates
        differ least; accept the trials that score above it.

    Raises
    ------
    ValueError
        If a score is not finite, a class is missing or the lengths differ.

    Example
    -------
    >>> rate, threshold = eer([0.9, 0.7, 0.4, 0.1], [True, True, False, False])
    >>> rate, round(threshold, 6)
    (0.0, 0.55)
    """
    cuts, p_miss, p_fa = operating_points(scores, labels)
    rate, nearest = equal_error_point(p_miss, p_fa)
    return rate, float(cuts[nearest])


def min_dcf(
    scores: npt.ArrayLike,
    labels: npt.ArrayLike,
    p_target: float,
) -> float:
    """Returns the minimum of the normalised detection cost, exact.

    This is the cost p_target * P_miss + (1 - p_target) * P_fa at the best
    threshold, divided by the cheaper of rejecting all and accepting all,
    min(p_target, 1 - p_target): the convention of NIST SRE and VoxCeleb.
    SpeechBrain's `minDCF` leaves out the division.

    Arguments
    ---------
    scores, labels : array-like, (T,), float and bool
        As of `eer`.
    p_target : float
        Prior probability of a target trial, between 0 and 1.

    Returns
    -------
    float
        From 0 to 1.

    Raises
    ------
    ValueError
        As `eer` does, and if the prior is out of range.

    Example
    -------
    >>> min_dcf([0.9, 0.4, 0.7, 0.1], [True, True, False, False], 0.5)
    0.5
    """
    if not 0 < p_target < 1:
        raise ValueError(f"p_target must be between 0 and 1, got {p_target}")
    _, p_miss, p_fa = operating_points(scores, labels)
    cost = p_target * p_miss + (1 - p_target) * p_fa
    return float(cost.min() / min(p_target, 1 - p_target))


def operating_points(
    scores: npt.ArrayLike, labels: npt.ArrayLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns cuts, p_miss and p_fa, (M + 1,) float64 for M distinct scores.

    The cuts run from accepting all trials to rejecting all. A cut accepts the
    trials that score above it. Raises ValueError as `count_rejected` does.
    """
    _, cuts, missed, refused = count_rejected(scores, labels)
    return cuts, missed / missed[-1], 1 - refused / refused[-1]


def count_rejected(
    scores: npt.ArrayLike, labels: npt.ArrayLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns the order (T,) of the trials by score, and counts for each cut.

    The M + 1 cuts are thresholds, float64, with the number of target and of
    non-target trials that each rejects. Raises ValueError if a score is not
    finite, a class is missing or the lengths differ.
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
    last = np.append(scores[1:] != scores[:-1], True)  # among equal scores
    rejected = np.append(0, np.flatnonzero(last) + 1)
    missed = np.append(0, np.cumsum(labels))[rejected]
    distinct = scores[last]
    # Halving first, because two scores near 1e308 sum to infinity. The middle
    # of two neighbouring floats may round to the upper score, and must stay
    # below it.
    middle = distinct[1:] / 2 + distinct[:-1] / 2
    middle = np.minimum(middle, np.nextafter(distinct[1:], -np.inf))
    cuts = np.hstack([-np.inf, middle, distinct[-1]])
    return order, cuts, missed, rejected - missed


class Resampled:
    """Sorted trials, for the EER of many resamples of speakers or recordings.

    `first` and `second`, int64 (T,), are the speakers or recordings (sides) of
    each trial. A trial between two sides counts as often as the product of
    their draws. A trial within a side counts as often as that side was drawn.
    Raises ValueError as `count_rejected` does.
    """

    def __init__(
        self,
        scores: npt.ArrayLike,
        labels: np.ndarray,
        first: np.ndarray,
        second: np.ndarray,
    ):
        order, _, self.missed, self.refused = count_rejected(scores, labels)
        # The last side is a dummy that is drawn once in every resample, so that
        # a trial within a side is not counted by the square.
        second = np.where(first == second, -1, second)[order]
        first, labels = first[order], labels[order]
        self.targets = first[labels], second[labels]
        self.others = first[~labels], second[~labels]

    def eer(self, times: np.ndarray) -> float:
        """Returns the EER of a resample; `times`, int64 (N,), are the draws.

        NaN if no trial of a class is drawn.
        """
        times = np.append(times, 1)
        misses, refusals = (
            np.append(0, np.cumsum(times[first] * times[second]))
            for first, second in (self.targets, self.others)
        )
        if not (misses[-1] and refusals[-1]):
            return np.nan
        p_miss = misses[self.missed] / misses[-1]
        p_fa = 1 - refusals[self.refused] / refusals[-1]
        return equal_error_point(p_miss, p_fa)[0]


def equal_error_point(
    p_miss: np.ndarray, p_fa: np.ndarray
) -> tuple[float, int]:
    """Returns the equal error rate, and the cut whose two rates are nearest."""
    gap = p_miss - p_fa  # grows from -1 to 1
    after = int(np.argmax(gap >= 0))
    before = after - 1
    weight = gap[before] / (gap[before] - gap[after])
    rate = p_miss[before] + weight * (p_miss[after] - p_miss[before])
    return float(rate), after if gap[after] <= -gap[before] else before
