"""Speaker verification: trial lists, scores, AS-norm, EER, minDCF, DET.

A trial asks whether an enrolment and a test utterance come from the same
speaker. Embeddings are computed once per utterance; what happens per trial is
array work, so that VoxCeleb1-E's 580 thousand trials take about a second.
"""

import dataclasses
import itertools
import os

import numpy as np
from scipy import sparse
from tqdm import tqdm

from lgl_plugin.files import atomic_write, leads_out

# Utterances and cohort utterances whose cosines are held at once: 32 MiB.
ROWS, COLUMNS = 256, 32768


@dataclasses.dataclass(frozen=True, eq=False)
class Trials:
    """A trial list over a set of utterances.

    Arguments
    ---------
    labels : numpy.ndarray, (T,), bool
        True for a target trial: both utterances are of one speaker.
    utterances : list of str
        The paths that occur in the list, each once, sorted.
    enrolment : numpy.ndarray, (T,), int64
        Each trial's enrolment utterance as an index into `utterances`.
    test : numpy.ndarray, (T,), int64
        Each trial's test utterance as an index into `utterances`.

    Example
    -------
    >>> trials = Trials(
    ...     np.array([True, False]),
    ...     ["ann/1.wav", "ann/2.wav", "bob/1.wav"],
    ...     np.array([0, 0]),
    ...     np.array([1, 2]),
    ... )
    >>> len(trials)
    2
    """

    labels: np.ndarray
    utterances: list
    enrolment: np.ndarray
    test: np.ndarray

    def __len__(self):
        return len(self.labels)


def read_trials(path, audio_folder=None, allow_outside=False):
    """Reads a trial list in VoxCeleb's form.

    One trial a line, `label enrolment test`: label 1 for the same speaker, 0
    for different ones, then two paths without blanks. Empty lines are skipped.

    Arguments
    ---------
    path : str or pathlib.Path
        The trial list, the recipe's `verification_file`.
    audio_folder : str or pathlib.Path, optional
        The folder that the list's paths start from, the recipe's
        `trial_folder`; when given, every utterance must exist there.
    allow_outside : bool
        Whether the list's paths may lead out of that folder.

    Returns
    -------
    Trials

    Raises
    ------
    FileNotFoundError
        When the list, the folder, or utterances in it do not exist.
    ValueError
        When a line is malformed or leads out of the folder, or there is no
        trial or only one class.

    Example
    -------
    >>> path = getfixture("tmp_path") / "trials.txt"
    >>> _ = path.write_text("1 ann/1.wav ann/2.wav\\n0 ann/1.wav bob/1.wav\\n")
    >>> trials = read_trials(path)
    >>> trials.utterances
    ['ann/1.wav', 'ann/2.wav', 'bob/1.wav']
    >>> trials.labels.tolist(), trials.test.tolist()
    ([True, False], [1, 2])
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"verification_file: there is no file {path}. Give the path of a "
            "trial list on this machine; training does without one if the "
            "yaml says verification_file: null"
        )
    words = []
    for number, row in _rows(path):
        if len(row) != 3 or row[0] not in ("0", "1"):
            raise ValueError(
                f"verification_file: {path}, line {number} is malformed: "
                f"{' '.join(row)[:200]!r}. Each line holds "
                "'label enrolment test' with label 1 (same speaker) or 0"
            )
        words += row
    if not words:
        raise ValueError(f"verification_file: {path} holds no trial")
    labels, enrolment, test = words[0::3], words[1::3], words[2::3]
    labels = np.array(labels) == "1"
    if labels.all() or not labels.any():
        raise ValueError(
            f"verification_file: all {len(labels)} trials of {path} have label "
            f"{labels[0]:d}: error rates need both target trials (1) and "
            "non-target trials (0)"
        )
    utterances = sorted({*enrolment, *test})
    if audio_folder is not None:
        if not allow_outside:
            _check_inside(path, utterances, audio_folder)
        _check_audio(path, utterances, audio_folder)
    index = {utterance: n for n, utterance in enumerate(utterances)}
    return Trials(
        labels,
        utterances,
        np.array([index[utterance] for utterance in enrolment]),
        np.array([index[utterance] for utterance in test]),
    )


def cosine_scores(embeddings, trials):
    """The cosine similarity of each trial's two embeddings.

    Arguments
    ---------
    embeddings : numpy.ndarray, (U, D), float
        One row per utterance, in the order of `trials.utterances`.
    trials : Trials
        The trials to score.

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
    >>> trials = Trials(
    ...     np.array([True, False]),
    ...     ["a", "b", "c"],
    ...     np.array([0, 0]),
    ...     np.array([1, 2]),
    ... )
    >>> embeddings = np.array([[1, 0], [2, 0], [0, 3]], dtype=np.float32)
    >>> cosine_scores(embeddings, trials).tolist()
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
    # Two gathered blocks of this many rows stay within tens of megabytes.
    for start in range(0, len(trials), 16384):
        block = slice(start, start + 16384)
        scores[block] = np.einsum(
            "td,td->t", unit[trials.enrolment[block]], unit[trials.test[block]]
        )
    return scores


def cohort_statistics(embeddings, cohort, top):
    """Where each utterance's highest scores against a cohort lie.

    The cohort stands for other speakers than the utterance's own. It must be
    embeddings of training utterances, never of the trials'; whose they are
    is not asked, so labels are neither needed nor a way in.

    Matches SpeechBrain's `speaker_verification_cosine.py`: cosines, the `top`
    (there `cohort_size`) highest of them, their mean, and their deviation
    with top - 1 as divisor. It computes them for both sides of every trial;
    here once per utterance, with some 100 MiB beside copies of both inputs.

    Arguments
    ---------
    embeddings : numpy.ndarray, (U, D), float
        One row per utterance of the trials.
    cohort : numpy.ndarray, (M, D), float
        One row per utterance of the cohort, of the same encoder.
    top : int
        Highest scores that count, from 2 to M; 300 to 1,000 are usual.

    Returns
    -------
    mean : numpy.ndarray, (U,), float32
        Of each utterance's `top` highest cosines.
    deviation : numpy.ndarray, (U,), float32
        Their sample standard deviation.

    Raises
    ------
    ValueError
        When an embedding is not finite, dimensions differ, or `top` is out
        of range.

    Example
    -------
    >>> cohort = np.array([[1, 0], [3, 4], [0, 1], [-1, 0]])
    >>> mean, deviation = cohort_statistics(np.array([[2, 0]]), cohort, top=2)
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
                # Several times faster than torch.topk, which keeps indices.
                best.partition(-top, axis=1)
                best = best[:, -top:]
        mean[rows] = best.mean(axis=1)
        deviation[rows] = best.std(axis=1, ddof=1)
    return mean, deviation


def adaptive_s_norm(scores, trials, mean, deviation):
    """Scores in units of what each side scores against its nearest cohort.

    Adaptive symmetric normalisation (AS-norm1 of Matejka et al. 2017): half
    the sum of (score - mean) / deviation of the enrolment's and of the test
    utterance's cohort scores; SpeechBrain's `score_norm: s-norm` with a
    `cohort_size`. A threshold then means the same for all utterances.

    Arguments
    ---------
    scores : array-like, (T,), float
        One score per trial.
    trials : Trials
        The trials that were scored.
    mean, deviation : numpy.ndarray, (U,), float
        From `cohort_statistics`, in the order of `trials.utterances`.

    Returns
    -------
    numpy.ndarray, (T,), float32
        Normalised scores, of any size.

    Raises
    ------
    ValueError
        When lengths do not match, or a deviation is not above 0.

    Example
    -------
    >>> trials = Trials(
    ...     np.array([True, False]),
    ...     ["a", "b", "c"],
    ...     np.array([0, 0]),
    ...     np.array([1, 2]),
    ... )
    >>> mean, deviation = np.array([0.2, 0.2, 0.3]), np.array([0.1, 0.1, 0.2])
    >>> adaptive_s_norm([0.7, 0.1], trials, mean, deviation).tolist()
    [5.0, -1.0]
    """
    scores = np.asarray(scores, np.float32)
    utterances = (len(trials.utterances),)
    if scores.shape != (len(trials),) or not (
        mean.shape == deviation.shape == utterances
    ):
        raise ValueError(
            f"{len(trials)} trials of {utterances[0]} utterances need as many "
            "scores, means and deviations, got shapes "
            f"{scores.shape}, {mean.shape} and {deviation.shape}"
        )
    bad = np.flatnonzero(~(deviation > 0))
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(mean)} utterances have equal scores against "
            f"all of their cohort, the first {trials.utterances[bad[0]]}: look "
            "for copies in the cohort or embeddings of zeros"
        )
    mean, deviation = mean.astype(np.float32), deviation.astype(np.float32)
    return np.float32(0.5) * sum(
        (scores - mean[side]) / deviation[side]
        for side in (trials.enrolment, trials.test)
    )


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


def bootstrap_eer(scores, trials, n_resamples=1000, level=0.95, seed=0):
    """Confidence interval of the EER, by drawing the speakers anew.

    Trials that share a speaker rise and fall together; drawn one by one, as
    if each were news, they give intervals that are far too narrow. So
    speakers are drawn with replacement, and the trials follow: one within a
    speaker counts as often as that one was drawn, one between two speakers
    as the product of both. The trials themselves say who spoke: utterances
    that target trials join, directly or by way of others, are one speaker.
    One whom the list leaves in several such groups counts as several, which
    makes the interval narrower, not wider.

    The interval is between percentiles of the draws. It says what other
    speakers of the same kind would give, not another training. Few speakers
    make it too narrow: intervals of 95 % held the true rate in 84, 92 and
    92 % of generated sets of 10, 25 and 60 speakers; those by drawing trials
    in 51, 45 and 44 % (`benchmarks/verification.py --coverage`).

    Arguments
    ---------
    scores : array-like, (T,), float
        Higher means more likely the same speaker.
    trials : Trials
        The trials that were scored.
    n_resamples : int
        Draws, each of as many speakers as there are. One that leaves no
        trial of a class is replaced.
    level : float
        Share of the draws that the interval holds, between 0 and 1.
    seed : int
        Of the draws.

    Returns
    -------
    low, high : float
        From 0 to 1.

    Raises
    ------
    ValueError
        When a score is not finite, a class is missing, lengths differ,
        `level` is out of range or there is one speaker only.

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
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    order, _, missed, refused = _ordered(scores, trials.labels)
    labels = trials.labels[order]
    n_speakers, speakers = _speakers(trials)
    if n_speakers == 1:
        raise ValueError(
            "all utterances are joined by target trials: no interval can be "
            "drawn from a single speaker"
        )
    first = speakers[trials.enrolment[order]]
    second = speakers[trials.test[order]]
    # Instead of a speaker a second time, one who is always drawn once.
    second[first == second] = n_speakers
    target, nontarget = (
        (first[chosen], second[chosen]) for chosen in (labels, ~labels)
    )
    rng = np.random.default_rng(seed)
    rates = []
    while len(rates) < n_resamples:
        drawn = rng.integers(n_speakers, size=n_speakers)
        times = np.append(np.bincount(drawn, minlength=n_speakers), 1)
        misses = _running_count(times, target)
        refusals = _running_count(times, nontarget)
        if misses[-1] and refusals[-1]:
            p_miss = misses[missed] / misses[-1]
            p_fa = 1 - refusals[refused] / refusals[-1]
            rates.append(_crossing(p_miss, p_fa)[0])
    low, high = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


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


def verify(embeddings, trials):
    """The figures by which speaker encoders are compared.

    Arguments
    ---------
    embeddings : numpy.ndarray, (U, D), float
        One row per utterance, in the order of `trials.utterances`.
    trials : Trials
        The trials to score.

    Returns
    -------
    dict
        `eer` in percent, `min_dcf_001` and `min_dcf_005` (p_target 0.01 and
        0.05, unit costs, normalised) and the cosine `threshold` at the EER.

    Raises
    ------
    ValueError
        When the rows do not match the utterances, or one is not finite.

    Example
    -------
    >>> trials = Trials(
    ...     np.array([True, False]),
    ...     ["a", "b", "c"],
    ...     np.array([0, 0]),
    ...     np.array([1, 2]),
    ... )
    >>> verify(np.array([[1, 0], [2, 0], [0, 3]]), trials)
    {'eer': 0.0, 'min_dcf_001': 0.0, 'min_dcf_005': 0.0, 'threshold': 0.5}
    """
    scores = cosine_scores(embeddings, trials)
    rate, threshold = eer(scores, trials.labels)
    return {
        "eer": 100 * rate,
        "min_dcf_001": min_dcf(scores, trials.labels, p_target=0.01),
        "min_dcf_005": min_dcf(scores, trials.labels, p_target=0.05),
        "threshold": threshold,
    }


def write_scores(path, trials, scores):
    """Writes scores as SpeechBrain does: `enrolment test label score`.

    Arguments
    ---------
    path : str or pathlib.Path
        The file to write, replaced as a whole.
    trials : Trials
        The trials that were scored.
    scores : array-like, (T,), float
        One score per trial.

    Raises
    ------
    ValueError
        When there is not one score per trial.

    Example
    -------
    >>> trials = Trials(
    ...     np.array([True, False]),
    ...     ["a", "b", "c"],
    ...     np.array([0, 0]),
    ...     np.array([1, 2]),
    ... )
    >>> path = getfixture("tmp_path") / "scores.txt"
    >>> write_scores(path, trials, [0.75, -0.5])
    >>> path.read_text().splitlines()
    ['a b 1 0.750000', 'a c 0 -0.500000']
    """
    name = trials.utterances.__getitem__
    lines = zip(
        map(name, trials.enrolment.tolist()),
        map(name, trials.test.tolist()),
        trials.labels.tolist(),
        np.asarray(scores).tolist(),
        strict=True,
    )
    with atomic_write(path) as out:
        out.writelines(map("%s %s %d %f\n".__mod__, lines))


def _rows(path):
    """Yields each line's number and its words, empty lines left out."""
    # A file that is no text at all is to be seen as malformed, line 1.
    with open(path, encoding="utf-8-sig", errors="replace") as source:
        for number, line in enumerate(source, 1):
            if row := line.split():
                yield number, row


def _check_inside(path, utterances, audio_folder):
    """Raises if the list at `path` names a file that is not in the folder."""
    outside = {
        utterance
        for utterance in utterances
        if leads_out(os.path.join(audio_folder, utterance), audio_folder)
    }
    for line, utterance in _lines_of(path, outside):
        raise ValueError(
            f"verification_file: {path}, line {line}: {utterance!r} leads out "
            f"of the trial_folder {audio_folder}. Put the audio, or a link to "
            "it, there. A list that you trust is taken as it is by training "
            "whose yaml says allow_outside_data_folder: True"
        )


def _lines_of(path, utterances):
    """Yields the first line and the name of utterances of the list."""
    left = set(utterances)
    for number, row in _rows(path):
        for utterance in row[1:]:
            if utterance in left:
                left.remove(utterance)
                yield number, utterance


def _check_audio(path, utterances, audio_folder):
    """Raises if utterances of the list at `path` are not in the folder."""
    if not os.path.isdir(audio_folder):
        raise FileNotFoundError(
            f"trial_folder: there is no folder {audio_folder}. The paths in "
            f"{path} are read from there"
        )
    # The bar shows itself only where looking takes long: a network disk.
    missing = {
        utterance
        for utterance in tqdm(utterances, "trial files", unit="file", delay=3)
        if not os.path.isfile(os.path.join(audio_folder, utterance))
    }
    if not missing:
        return
    first = itertools.islice(_lines_of(path, missing), 5)
    named = [f"  line {line}: {name!r}" for line, name in first]
    raise FileNotFoundError(
        f"trial_folder: {len(missing)} of the {len(utterances)} utterances "
        f"that {path} names are not in {audio_folder}. The first ones:\n"
        + "\n".join(named)
        + "\nSet trial_folder to the folder that these paths start from"
    )


def _unit(embeddings, what, names=None):
    """Embeddings at length 1, zeros left; raises if one is not finite."""
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(norms))
    if len(bad):
        first = f"that of {names[bad[0]]}" if names else f"in row {bad[0]}"
        raise ValueError(
            f"{len(bad)} of {len(norms)} {what} are not finite, the first "
            f"{first}: look for a diverged encoder or a damaged file"
        )
    return embeddings / np.maximum(norms, np.finfo(np.float32).tiny)


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


def _speakers(trials):
    """The number of speakers as far as trials tell, and each utterance's."""
    pairs = trials.enrolment[trials.labels], trials.test[trials.labels]
    size = len(trials.utterances)
    joined = sparse.coo_matrix((np.ones(len(pairs[0])), pairs), (size, size))
    return sparse.csgraph.connected_components(joined, directed=False)


def _running_count(times, sides):
    """How often the first n trials count, for n from 0 to all."""
    first, second = sides
    return np.append(0, np.cumsum(times[first] * times[second]))
