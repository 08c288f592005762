"""A verdict without labels: whether one encoder is better than another.

Both encoders score the same pseudo-trials, pairs of whole recordings. Each
encoder clusters the recordings by its own scores. A pair is a target trial if
both encoders put it into one cluster, and a non-target trial if both put it
into different clusters. A pair on which the encoders disagree is no trial: a
mistake of one encoder alone helps neither. The interval comes from resampling
recordings, not trials, because thousands of trials share a recording.

The verdict can mislead:

- Mistakes that both encoders make count as the truth, so that the error rates
  are not the true ones.
- Pairs on which the encoders disagree are left out. So the measured change is
  smaller than the true one, and small gains show only on many recordings.
- With few speakers, recordings are not independent, and the interval is too
  narrow. The interval also ignores that the clusters could have been others.
- An encoder that was trained on these recordings looks better than it is.

If the clusters are sessions instead of speakers, an encoder wins by knowing
rooms, lines and microphones. With fewer clusters, of several sessions each, it
loses. So the verdict stays open if half or a quarter of the clusters say the
opposite. `benchmarks/verdict.py` measures all this where labels exist.
"""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

from lgl_plugin.clustering.clearest import clearest_clusters, silhouettes
from lgl_plugin.clustering.kmeans import TorchKMeans
from lgl_plugin.clustering.number import FIRST_STEP
from lgl_plugin.clustering.two_step import TwoStepKMeans
from lgl_plugin.clustering.vectors import normalised
from lgl_plugin.inference.backends import Centring
from lgl_plugin.inference.ward_clusters import ward_estimate
from lgl_plugin.metrics.error_rates import Resampled

# The fewest recordings and target trials for which an interval says anything;
# and the most trials of a kind, since more change no error rate.
FEWEST, FEWEST_TARGETS, MOST = 10, 10, 100_000
RESAMPLES, LEVEL = 1000, 0.95
# Raise it if a change of the code may change a verdict: `lgl adapt` then judges
# a begun folder again.
RULE = 3
# Groups of few recordings count as speakers if there are at least this many
# groups, of at least this mean silhouette. With fewer or less clear groups
# verdicts were wrong (docs/adapt_measured.md).
FEWEST_GROUPS, CLEAR = 4, 1 / 3
# The verdict is repeated with the number of clusters divided by each of these.
COARSER = (2, 4)


def check_enough(number: int, found: str, advice: str = "") -> None:
    """Raises ValueError, beginning with `found`, if recordings are too few."""
    if number < FEWEST:
        raise ValueError(f"{found}, and a verdict takes {FEWEST}{advice}")


def count_speakers(vectors: ArrayLike) -> int:
    """Estimates how many speakers the recordings have.

    Arguments
    ---------
    vectors : array-like
        Their embeddings by the given encoder, float (N, D), N from 10.

    Raises
    ------
    ValueError
        If the recordings are too few for a verdict, or form no groups.

    Example
    -------
    >>> rng = np.random.default_rng(0)
    >>> voices = np.repeat(rng.normal(size=(12, 16)), 9, axis=0)
    >>> count_speakers(voices + 0.1 * rng.normal(size=voices.shape))
    12
    """
    vectors = np.asarray(vectors)
    check_enough(len(vectors), f"there are {len(vectors)} recordings")
    estimate = ward_estimate(vectors)
    if not estimate.is_guess:
        return estimate.n_clusters
    # Few recordings may form clear groups, though not beyond chance.
    unit = normalised(Centring().fit_transform(vectors))
    groups = clearest_clusters(unit)
    number = int(groups.max()) + 1
    if number < FEWEST_GROUPS or silhouettes(unit, groups).mean() < CLEAR:
        raise ValueError(
            "nothing can be judged, since the encoder finds no clear groups "
            f"among {len(vectors)} recordings. Either they are too few, or "
            f"they are of fewer than {FEWEST_GROUPS} speakers, or each speaker "
            "has one only, or the encoder does not tell speakers apart."
        )
    return number


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Error rates on pseudo-trials before and after, in per cent.

    Arguments
    ---------
    recordings : int
        Number of recordings in the pseudo-trials.
    before, after : float
        Equal error rates.
    low, high : float
        The 95 % interval of the difference, after minus before.
    opposite : int
        Number of clusters with which the verdict is the opposite, 0 if none.

    Example
    -------
    >>> print(Verdict(200, before=4.0, after=2.5, low=-2.1, high=-0.8))
    better: 4.0 % to 2.5 % on pseudo-trials of 200 recordings (-2.1 to -0.8 \
points)
    """

    recordings: int
    before: float
    after: float
    low: float
    high: float
    opposite: int = 0

    @property
    def sign(self) -> int:
        """Returns -1 for better, 1 for worse, 0 for an open verdict."""
        return 0 if self.opposite else (self.low > 0) - (self.high < 0)

    @property
    def word(self) -> str:
        """Returns the verdict in a word or two."""
        return {-1: "better", 0: "no difference", 1: "worse"}[self.sign]

    @property
    def doubt(self) -> str:
        """Says why the verdict is open though the interval excludes 0."""
        if not self.opposite:
            return ""
        return (
            f"{self.opposite} clusters say the opposite: the more numerous "
            "ones may be sessions, not speakers"
        )

    def __str__(self) -> str:
        shown = ""
        if self.opposite:
            shown = f" that is sure ({self.doubt})"
        elif not self.sign:
            shown = f" that these {self.recordings} recordings can show"
        return (
            f"{self.word}{shown}: {self.before:.1f} % to "
            f"{self.after:.1f} % on pseudo-trials of {self.recordings} "
            f"recordings ({self.low:+.1f} to {self.high:+.1f} points)"
        )


def judge(
    before: ArrayLike,
    after: ArrayLike,
    n_speakers: int,
) -> Verdict:
    """Compares two encoders by pseudo-trials of the same recordings.

    Arguments
    ---------
    before, after : array-like
        Embeddings of the recordings, after the back-end if there is one,
        float (N, D) and (N, D'), N from 10, in the same order.
    n_speakers : int
        About how many speakers the recordings have: `count_speakers`.

    Raises
    ------
    ValueError
        If the recordings differ in number, or if recordings or target trials
        are too few.

    Example
    -------
    >>> rng = np.random.default_rng(0)
    >>> voices = np.repeat(rng.normal(size=(20, 16)), 9, axis=0)
    >>> def heard(noise):
    ...     return voices + noise * rng.normal(size=voices.shape)
    >>> judge(heard(1.0), heard(0.7), n_speakers=20).sign
    -1
    """
    encoders = [normalised(np.asarray(side)) for side in (before, after)]
    if len(encoders[0]) != len(encoders[1]):
        raise ValueError(
            f"before and after are of {len(encoders[0])} and "
            f"{len(encoders[1])} recordings, not of the same"
        )
    number = len(encoders[0])
    check_enough(number, f"there are {number} recordings")
    verdict = _compare(encoders, n_speakers)
    for part in COARSER:
        fewer = n_speakers // part
        if not verdict.sign or fewer < 2:
            break
        if _compare(encoders, fewer).sign == -verdict.sign:
            verdict = dataclasses.replace(verdict, opposite=fewer)
    return verdict


def _compare(encoders, n_clusters):
    """Compares two encoders' unit embeddings by `n_clusters` clusters."""
    cluster = TwoStepKMeans(TorchKMeans(FIRST_STEP), n_clusters)
    clusters = [cluster(points).labels for points in encoders]
    rng = np.random.default_rng(0)
    first, second, labels = _trials(clusters, rng)
    number, n_targets = len(encoders[0]), np.count_nonzero(labels)
    if n_targets < FEWEST_TARGETS:
        raise ValueError(
            f"nothing can be judged: among {number} recordings {n_targets} "
            "pairs are of one cluster before and after, and "
            f"{FEWEST_TARGETS} are needed. Give more recordings of each "
            "speaker."
        )
    curves = [
        Resampled((points @ points.T)[first, second], labels, first, second)
        for points in encoders
    ]
    once = np.ones(number, np.int64)
    rates = [100 * curve.eer(once) for curve in curves]
    changes = []
    for _ in range(RESAMPLES):
        times = np.bincount(rng.integers(number, size=number), minlength=number)
        changes.append(100 * (curves[1].eer(times) - curves[0].eer(times)))
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(changes, [tail, 1 - tail])
    return Verdict(number, rates[0], rates[1], float(low), float(high))


def _trials(clusters, rng):
    """Returns the pairs on which two clusterings agree; labels, 1 a target."""
    first, second = np.triu_indices(len(clusters[0]), 1)
    same, also = (labels[first] == labels[second] for labels in clusters)
    kinds = np.flatnonzero(same & also), np.flatnonzero(~same & ~also)
    targets, nontargets = (
        rng.choice(pairs, MOST, replace=False) if len(pairs) > MOST else pairs
        for pairs in kinds
    )
    chosen = np.concatenate([targets, nontargets])
    labels = np.arange(len(chosen)) < len(targets)
    return first[chosen], second[chosen], labels
