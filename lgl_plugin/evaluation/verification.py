"""Speaker verification: cosine scores, AS-norm, error rates, intervals.

A trial asks if an enrolment and a test utterance come from the same speaker.
Embeddings are computed once per utterance. Each trial costs array work only, so
VoxCeleb1-E's 580 thousand trials take about a second.
"""

from __future__ import annotations

import pathlib

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from lgl_plugin.dataio.trials import Trials
from lgl_plugin.metrics.error_rates import Resampled, eer, min_dcf
from lgl_plugin.utils.checks import check_from
from lgl_plugin.utils.files import atomic_write

# Numbers of utterances and of cohort utterances whose cosines are in memory at
# once: 32 MiB.
ROWS, COLUMNS = 256, 32768
# Trials whose embeddings are gathered at once: tens of megabytes.
TRIALS = 16384
TOP = 300  # nearest cohort utterances that AS-norm uses


def cosine_scores(embeddings: ArrayLike, trials: Trials) -> np.ndarray:
    """Computes the cosine similarity of each trial's two embeddings.

    Arguments
    ---------
    embeddings, trials : array-like, (U, D), float, and Trials
        The trials to score, and an embedding for each of `trials.utterances`.

    Returns
    -------
    numpy.ndarray, (T,), float32
        From -1 to 1; 0 where an embedding is all zeros.

    Raises
    ------
    ValueError
        When the rows do not match the utterances, or one is not finite.

    Example
    -------
    >>> sides = np.array([[0, 0], [1, 2]])  # a against b, a against c
    >>> trials = Trials(np.array([True, False]), ["a", "b", "c"], *sides)
    >>> cosine_scores([[1, 0], [2, 0], [0, 3]], trials).tolist()
    [1.0, 0.0]
    """
    embeddings = np.asarray(embeddings, np.float32)
    if embeddings.ndim != 2 or len(embeddings) != len(trials.utterances):
        raise ValueError(
            f"embeddings have shape {embeddings.shape}, but the trials name "
            f"{len(trials.utterances)} utterances: one row each is needed"
        )
    unit = _unit(embeddings, "embeddings", trials.utterances)
    scores = np.empty(len(trials), np.float32)
    for start in range(0, len(trials), TRIALS):
        block = slice(start, start + TRIALS)
        scores[block] = np.einsum(
            "td,td->t", unit[trials.enrolment[block]], unit[trials.test[block]]
        )
    return scores


def cohort_statistics(
    embeddings: ArrayLike, cohort: ArrayLike, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """Computes mean and deviation of each utterance's highest cohort scores.

    The result equals that of SpeechBrain's `speaker_verification_cosine.py`,
    which computes it per trial instead of per utterance. The function needs
    some 100 MiB in addition to both inputs.

    Arguments
    ---------
    embeddings, cohort : array-like, (U, D) and (M, D), float
        Embeddings, by the same encoder, of the trials' utterances, and of
        training utterances, which must not be in the trials. No labels are
        needed.
    top : int
        Number of highest cosines that count, from 2 to M; 300 to 1,000 are
        usual. SpeechBrain's `cohort_size`.

    Returns
    -------
    mean, deviation : numpy.ndarray, (U,), float32
        Of those cosines; the deviation is the sample's, by top - 1.

    Raises
    ------
    ValueError
        When an embedding is not finite, dimensions differ, or `top` is out
        of range.

    Example
    -------
    >>> cohort = [[1, 0], [3, 4], [0, 1], [-1, 0]]
    >>> mean, deviation = cohort_statistics([[2, 0]], cohort, top=2)
    >>> print(mean.round(3), deviation.round(3))
    [0.8] [0.283]
    """
    embeddings = np.asarray(embeddings, np.float32)
    cohort = np.asarray(cohort, np.float32)
    if embeddings.ndim != 2 or embeddings.shape[1:] != cohort.shape[1:]:
        raise ValueError(
            "embeddings and cohort need rows of one length, got shapes "
            f"{embeddings.shape} and {cohort.shape}"
        )
    if not 2 <= top <= len(cohort):
        raise ValueError(
            f"top={top} must be at least 2 and at most the {len(cohort)} "
            "utterances of the cohort"
        )
    unit, cohort = _unit(embeddings, "embeddings"), _unit(cohort, "the cohort")
    mean, deviation = np.empty((2, len(unit)), np.float32)
    for start in range(0, len(unit), ROWS):
        rows = slice(start, start + ROWS)
        best = np.empty((len(unit[rows]), 0), np.float32)
        for first in range(0, len(cohort), COLUMNS):
            scores = unit[rows] @ cohort[first : first + COLUMNS].T
            best = np.hstack([best, scores])
            if best.shape[1] > top:
                # Several times faster than torch.topk, which returns indices,
                # too.
                best.partition(-top, axis=1)
                best = best[:, -top:]
        mean[rows] = best.mean(axis=1)
        deviation[rows] = best.std(axis=1, ddof=1)
    return mean, deviation


def adaptive_s_norm(
    scores: ArrayLike, trials: Trials, mean: ArrayLike, deviation: ArrayLike
) -> np.ndarray:
    """Normalises scores by each side's scores against its nearest cohort.

    Adaptive symmetric normalisation (AS-norm1 of Matejka et al. 2017;
    SpeechBrain's `score_norm: s-norm`): the mean over both sides of (score -
    mean) / deviation. A threshold then means the same for all utterances.

    Arguments
    ---------
    scores, trials : array-like, (T,), float, and Trials
        The trials, and one score each.
    mean, deviation : array-like, (U,), float
        From `cohort_statistics`, in the order of `trials.utterances`.

    Returns
    -------
    numpy.ndarray, (T,), float32

    Raises
    ------
    ValueError
        When lengths do not match, or a deviation is not above 0.

    Example
    -------
    >>> sides = np.array([[0, 0], [1, 2]])  # a against b, a against c
    >>> trials = Trials(np.array([True, False]), ["a", "b", "c"], *sides)
    >>> mean, deviation = np.array([0.2, 0.2, 0.3]), np.array([0.1, 0.1, 0.2])
    >>> adaptive_s_norm([0.7, 0.1], trials, mean, deviation).tolist()
    [5.0, -1.0]
    """
    scores = np.asarray(scores, np.float32)
    mean = np.asarray(mean, np.float32)
    deviation = np.asarray(deviation, np.float32)
    utterances = (len(trials.utterances),)
    if scores.shape != (len(trials),) or not (
        mean.shape == deviation.shape == utterances
    ):
        raise ValueError(
            f"{len(trials)} trials of {utterances[0]} utterances need as many "
            "scores, means and deviations, got shapes "
            f"{scores.shape}, {mean.shape} and {deviation.shape}"
        )
    bad = np.flatnonzero(~(deviation > 0))  # NaN too
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(mean)} utterances have equal scores against "
            f"all of their cohort, the first {trials.utterances[bad[0]]}: look "
            "for copies in the cohort or embeddings of zeros"
        )
    return np.float32(0.5) * sum(
        (scores - mean[side]) / deviation[side]
        for side in (trials.enrolment, trials.test)
    )


def as_norm(
    scores: ArrayLike,
    trials: Trials,
    embeddings: ArrayLike,
    cohort: np.ndarray,
    top: int = TOP,
) -> np.ndarray:
    """Normalises scores by the `top` nearest of a cohort, or all of fewer."""
    nearest = min(top, len(cohort))
    statistics = cohort_statistics(embeddings, cohort, nearest)
    return adaptive_s_norm(scores, trials, *statistics)


def bootstrap_eer(
    scores: ArrayLike, trials: Trials, n_resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Estimates a 95 % interval of the EER by resampling speakers.

    Trials that share a speaker are correlated, so resampling trials gives
    intervals that are far too narrow. Here a trial within a speaker counts as
    often as that speaker was drawn. A trial between two speakers counts as the
    product of both draws. Utterances that target trials connect, also through
    other utterances, are one speaker. The interval is for other speakers of the
    same kind, not for another training. It contained the true rate in 84, 92
    and 92 % of generated sets of 10, 25 and 60 speakers; resampled trials did
    in 51, 45 and 44 % (`benchmarks/verification.py --coverage`).

    Arguments
    ---------
    scores, trials : array-like, (T,), float, and Trials
        The trials, and one score each, higher for the same speaker.
    n_resamples, seed : int
        Number of draws, at least 1, and their seed. A draw without target or
        without non-target trials is replaced.

    Returns
    -------
    low, high : float
        Fractions, from 0 to 1.

    Raises
    ------
    ValueError
        When scores and trials do not fit, as in `eer`, `n_resamples` is below
        1 or there are fewer than three speakers.

    Example
    -------
    >>> first, second = np.triu_indices(60, 1)  # 15 speakers, 4 times each
    >>> names = [f"{n:02d}.wav" for n in range(60)]
    >>> trials = Trials(first % 15 == second % 15, names, first, second)
    >>> scores = np.random.default_rng(0).normal(2.0 * trials.labels)
    >>> low, high = bootstrap_eer(scores, trials)
    >>> low < eer(scores, trials.labels)[0] < high
    True
    """
    check_from(1, n_resamples=n_resamples)
    n_speakers, speakers = speakers_of(trials)
    sides = speakers[trials.enrolment], speakers[trials.test]
    resampled = Resampled(scores, trials.labels, *sides)
    if n_speakers < 3:
        # With two speakers all draws that leave both kinds of trials are the
        # same.
        raise ValueError(
            "target trials join the utterances to fewer than three speakers: "
            "no interval can be drawn from these"
        )
    rng = np.random.default_rng(seed)
    rates = []
    while len(rates) < n_resamples:
        drawn = rng.integers(n_speakers, size=n_speakers)
        rate = resampled.eer(np.bincount(drawn, minlength=n_speakers))
        if not np.isnan(rate):
            rates.append(rate)
    low, high = np.quantile(rates, [0.025, 0.975])
    return float(low), float(high)


def figures_of(scores: ArrayLike, trials: Trials) -> dict[str, float]:
    """Computes the figures by which speaker encoders are compared.

    Arguments
    ---------
    scores, trials : array-like, (T,), float, and Trials
        The trials, and one score each, higher for the same speaker.

    Returns
    -------
    dict
        `eer`, in percent, as in metrics.jsonl; `min_dcf_001` and `min_dcf_005`
        (p_target 0.01 and 0.05, unit costs, normalised); the `threshold` at the
        EER.

    Raises
    ------
    ValueError
        As `eer` does.

    Example
    -------
    >>> sides = np.array([[0, 0], [1, 2]])  # a against b, a against c
    >>> trials = Trials(np.array([True, False]), ["a", "b", "c"], *sides)
    >>> scores = cosine_scores([[1, 0], [2, 0], [0, 3]], trials)
    >>> figures = figures_of(scores, trials)
    >>> figures["eer"], figures["min_dcf_001"], figures["threshold"]
    (0.0, 0.0, 0.5)
    """
    rate, threshold = eer(scores, trials.labels)
    return {
        "eer": 100 * rate,
        "min_dcf_001": min_dcf(scores, trials.labels, p_target=0.01),
        "min_dcf_005": min_dcf(scores, trials.labels, p_target=0.05),
        "threshold": threshold,
    }


def error_rates(scores: np.ndarray, trials: Trials, seed: int = 0) -> dict:
    """Computes the error rates of a system's scores, float (T,).

    `eer` is in percent. `eer_interval` is its 95 % interval from a bootstrap
    over speakers, None for lists with fewer than three speakers. `min_dcf_001`
    and `min_dcf_005` are for target priors of 1 and 5 %. `threshold` is that at
    the EER. Raises ValueError if a score is not finite.
    """
    figures = figures_of(scores, trials)
    try:
        interval = bootstrap_eer(scores, trials, seed=seed)
        interval = [100 * end for end in interval]
    except ValueError:
        # The scores were validated above, so ValueError here means too few
        # speakers.
        interval = None
    return {"eer": figures["eer"], "eer_interval": interval, **figures}


def rates_at(
    threshold: float, scores: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """Computes the error rates at an encoder's own threshold.

    Scores and labels are (T,). As in `lgl compare`, a score equal to the
    threshold is accepted. Returns `encoder_threshold`, and in percent
    `false_acceptance`, of non-targets, and `false_rejection`, of targets.
    """
    accepted = np.asarray(scores) >= threshold
    return {
        "encoder_threshold": threshold,
        "false_acceptance": 100 * float(accepted[~labels].mean()),
        "false_rejection": 100 * float((~accepted)[labels].mean()),
    }


def write_scores(
    path: str | pathlib.Path, trials: Trials, scores: ArrayLike
) -> None:
    """Writes scores as SpeechBrain does: `enrolment test label score`.

    Tabs separate the columns if the trial list has names with blanks. Raises
    ValueError, and keeps an earlier file, if there is not one score per trial.
    """
    name = trials.utterances.__getitem__
    lines = zip(
        map(name, trials.enrolment.tolist()),
        map(name, trials.test.tolist()),
        trials.labels.tolist(),
        np.asarray(scores).tolist(),
        strict=True,
    )
    gap = "\t" if any(" " in name for name in trials.utterances) else " "
    with atomic_write(path) as out:
        form = gap.join(["%s", "%s", "%d", "%f\n"])
        out.writelines(map(form.__mod__, lines))


def _unit(embeddings, what, names=None):
    """Returns rows at length 1, zeros unchanged; ValueError if not finite."""
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(norms))
    if len(bad):
        first = f"that of {names[bad[0]]}" if names else f"in row {bad[0]}"
        raise ValueError(
            f"{len(bad)} of {len(norms)} {what} are not finite, the first "
            f"{first}: look for a diverged encoder or a damaged file"
        )
    return embeddings / np.maximum(norms, np.finfo(np.float32).tiny)


def speakers_of(trials: Trials) -> tuple[int, np.ndarray]:
    """Returns the number of speakers, and each utterance's speaker (U,).

    Utterances that target trials connect are one speaker.
    """
    pairs = trials.enrolment[trials.labels], trials.test[trials.labels]
    size = len(trials.utterances)
    joined = sparse.coo_matrix((np.ones(len(pairs[0])), pairs), (size, size))
    return sparse.csgraph.connected_components(joined, directed=False)
