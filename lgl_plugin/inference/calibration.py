"""A decision threshold for cosine scores, found without labels.

SpeechBrain's `verify_batch` accepts a pair above a cosine of 0.25, which suits
the encoder that it was found for and no other. Two ways need no speaker's
name; how far off they are is measured by `benchmarks/thresholds.py`.
"""

import numpy as np

from lgl_plugin.clustering.kmeans import normalised
from lgl_plugin.dataio.audio import BadAudio
from lgl_plugin.dataio.manifest import Manifest, held_out
from lgl_plugin.metrics.error_rates import eer

# Held-out utterances that a threshold is found with, and as many others.
SAMPLE = 1000


def find_threshold(extract, manifest, share, seed, pseudo=None):
    """A threshold for an encoder from the utterances that it was trained with.

    By pseudo-labels where there are any, else by halves.

    Arguments
    ---------
    extract : lgl_plugin.inference.extractor.Extractor
        Around the encoder.
    manifest : lgl_plugin.dataio.manifest.Manifest
        The run's.
    share, seed : float, int
        Of the utterances held out, see `manifest.held_out`.
    pseudo : (iterable of str, iterable of int), optional
        Utterance IDs and pseudo-labels.

    Returns
    -------
    decision : (float, str) or None
        The threshold and the way it was found, "pseudo-labels" or "halves".
    vectors : numpy.ndarray
        Embeddings (n, dim) of the utterances that were drawn, float32.

    Raises
    ------
    lgl_plugin.dataio.audio.BadAudio
        If none of them can be read.

    Example
    -------
    >>> import soundfile
    >>> from speechbrain.lobes.features import Fbank
    >>> from lgl_plugin.inference.extractor import Extractor
    >>> from lgl_plugin.nnet.encoders import LogMelStatistics
    >>> rows, rng = [], np.random.default_rng(0)
    >>> for name in "abcd":
    ...     path = str(getfixture("tmp_path") / f"{name}.wav")
    ...     tone = np.sin(np.arange(32000) * rng.uniform(0.1, 1))
    ...     noise = rng.normal(scale=0.01, size=32000)
    ...     soundfile.write(path, 0.5 * tone + noise, 16000)
    ...     rows.append((name, path, 0.0, 2.0, ""))
    >>> extract = Extractor(Fbank(n_mels=80), None, LogMelStatistics())
    >>> (threshold, way), vectors = find_threshold(
    ...     extract, Manifest.of(rows), share=0.5, seed=0
    ... )
    >>> way, 0 < threshold < 1, vectors.shape
    ('halves', True, (4, 160))
    """
    train, aside = held_out(len(manifest), share, seed)
    rng = np.random.default_rng(seed)
    train, aside = (rng.permutation(rows)[:SAMPLE] for rows in (train, aside))
    drawn, _ = extract(manifest, np.concatenate([aside, train]))
    if pseudo is not None:
        wanted = set(drawn.utterances)
        label = {name: n for name, n in zip(*pseudo) if name in wanted}
        labels = [label.get(name, -1) for name in drawn.utterances]
        names = {manifest.ids[row] for row in aside}
        mask = [name in names for name in drawn.utterances]
        found = from_pseudo_labels(drawn.vectors, labels, mask)
        if found is not None:
            return (found, "pseudo-labels"), drawn.vectors
    found = from_halves(*_halves(extract, manifest, aside))
    decision = None if found is None else (found, "halves")
    return decision, drawn.vectors


def from_pseudo_labels(vectors, labels, held_out):
    """The equal-error threshold of pairs with a held-out utterance.

    A pair is a target trial if both utterances have the same pseudo-label.
    One of each pair is held out: training has pulled the others to their
    pseudo-speaker's centre, and pairs of those would put the threshold too
    high.

    Arguments
    ---------
    vectors : numpy.ndarray
        Embeddings (N, dim), float32, of any length.
    labels : numpy.ndarray
        Their pseudo-labels (N,), int64, -1 where there is none.
    held_out : numpy.ndarray
        Which of them no gradient was taken on, bool (N,).

    Returns
    -------
    float or None
        A cosine; accept what scores above it. None if the pairs are all of
        one kind.

    Example
    -------
    >>> vectors = np.array([[4, 0], [4, 1], [0, 4], [1, 4]], np.float32)
    >>> held_out = np.array([True, False, True, False])
    >>> threshold = from_pseudo_labels(vectors, [0, 0, 1, 1], held_out)
    >>> round(threshold, 3)  # midway between 0.970 and 0.243
    0.606
    """
    labels, held_out = np.asarray(labels), np.asarray(held_out)
    known = labels >= 0
    unit, labels = normalised(vectors[known]), labels[known]
    chosen = np.flatnonzero(held_out[known])
    number = np.full(len(labels), -1)
    number[chosen] = np.arange(len(chosen))
    # A pair of two that are held out counts once, and none with itself.
    once = number[None] < np.arange(len(chosen))[:, None]
    same = (labels[chosen, None] == labels[None])[once]
    if same.all() or not same.any():
        return None
    return eer((unit[chosen] @ unit.T)[once], same)[1]


def from_halves(first, second):
    """The equal-error threshold of utterances' halves against each other.

    Two halves of one utterance are a target trial, halves of two a
    non-target trial. Halves share their session, and a short half scores
    lower than a whole utterance: both are off, in opposite directions.

    Arguments
    ---------
    first, second : numpy.ndarray
        Embeddings of the halves of the same utterances, (N, dim), float32.

    Returns
    -------
    float or None
        A cosine; accept what scores above it. None of fewer than two
        utterances.

    Example
    -------
    >>> from_halves(np.eye(3), np.eye(3))
    0.5
    """
    if len(first) < 2:
        return None
    scores = normalised(first) @ normalised(second).T
    return eer(scores.ravel(), np.eye(len(scores), dtype=bool).ravel())[1]


def _halves(extract, manifest, rows):
    """Embeddings of the first and second halves, where both have one."""
    halves = Manifest.of(
        (
            f"{half} {row}",
            item["wav"],
            item["offset"] + half * item["duration"] / 2,
            item["duration"] / 2,
            "",
            *([item["place"]] if item["place"] else []),
        )
        for row in rows.tolist()
        for item in [manifest[row]]
        for half in (0, 1)
    )
    try:
        found, _ = extract(halves, np.arange(len(halves)))
    except BadAudio:  # all too short
        return [], []
    there = {*found.utterances}
    both = [row for row in rows if {f"0 {row}", f"1 {row}"} <= there]
    return [found.rows([f"{half} {row}" for row in both]) for half in (0, 1)]
