"""A decision threshold for cosine scores, found without labels.

SpeechBrain's `verify_batch` accepts a pair above a cosine of 0.25, which suits
only the encoder for which it was found. Two methods here need no labels: by
pseudo-labels, and by halves of utterances. `benchmarks/thresholds.py` measures
their errors.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lgl_plugin.clustering.vectors import normalised
from lgl_plugin.dataio.audio import BadAudio
from lgl_plugin.dataio.manifest import Manifest, Strings, held_out
from lgl_plugin.metrics.error_rates import eer
from lgl_plugin.utils.files import read_json, write_json

THRESHOLD = "threshold.json"
# The most held-out utterances for a threshold, and the most trained ones.
SAMPLE = 1000


def find_threshold(
    extract: Callable,
    manifest: Manifest,
    share: float,
    seed: int,
    pseudo: tuple[Iterable[str], Iterable[int]] | None = None,
    labelled: ArrayLike = (),
) -> tuple[tuple[float, str] | None, np.ndarray]:
    """Finds an encoder's threshold with the utterances of its training.

    If `pseudo`, utterance IDs and pseudo-labels, is given, the threshold comes
    from them, else from halves of utterances. `share`, `seed` and `labelled`
    define the held-out utterances, see `manifest.held_out`. Returns
    (threshold, method) or None, where the method is "pseudo-labels" or
    "halves"; and the embeddings, float32 (n, D), of the utterances that were
    drawn. Raises BadAudio if none of them can be read.
    """
    train, aside = _draw(manifest, share, seed, labelled)
    drawn, _ = extract(manifest, np.concatenate([aside, train]))
    if pseudo is not None:
        wanted = set(drawn.utterances)
        label_of = {name: n for name, n in zip(*pseudo) if name in wanted}
        labels = [label_of.get(name, -1) for name in drawn.utterances]
        names = {manifest.ids[row] for row in aside}
        mask = [name in names for name in drawn.utterances]
        threshold = threshold_by_pseudo_labels(drawn.vectors, labels, mask)
        if threshold is not None:
            return (threshold, "pseudo-labels"), drawn.vectors
    threshold = threshold_by_halves(extract, manifest, share, seed, labelled)
    decision = None if threshold is None else (threshold, "halves")
    return decision, drawn.vectors


def threshold_by_halves(
    extract: Callable,
    manifest: Manifest,
    share: float,
    seed: int,
    labelled: ArrayLike = (),
) -> float | None:
    """Returns the equal-error threshold of halves of held-out utterances.

    The arguments are those of `find_threshold`. Returns None if fewer than two
    utterances have two halves that can be embedded.
    """
    _, aside = _draw(manifest, share, seed, labelled)
    first, second = _embed_halves(extract, manifest, aside)
    # Two errors partly cancel: halves share their session, which raises scores,
    # and a half is shorter than an utterance, which lowers them.
    return pairs_eer(first, second)[1] if len(first) >= 2 else None


def kept_threshold(
    path: pathlib.Path, made_from: Any, find: Callable[[], float | None]
) -> float | None:
    """Returns the threshold that an earlier call found, or else finds it.

    The file at `path` keeps the threshold with `made_from`, plain data. If they
    have changed, the threshold is found again.
    """
    kept = read_json(path)
    if kept.get("made_from") == made_from and "threshold" in kept:
        return kept["threshold"]
    threshold = find()
    write_json(path, {"threshold": threshold, "made_from": made_from})
    return threshold


def threshold_by_pseudo_labels(
    vectors: np.ndarray, labels: ArrayLike, held_out: ArrayLike
) -> float | None:
    """Returns the equal-error threshold of pairs with a held-out utterance.

    Takes embeddings (N, D), pseudo-labels (N,) int64, -1 for none, and a mask
    (N,) of the utterances that were held out of training. A pair is a target
    trial if both utterances have the same pseudo-label. At least one of a pair
    is held out: training has pulled the other utterances to the centres of
    their pseudo-speakers, and pairs of these would raise the threshold too far.
    Returns None if there are no target or no non-target trials.
    """
    labels, held_out = np.asarray(labels), np.asarray(held_out)
    labelled = labels >= 0
    unit, labels = normalised(vectors[labelled]), labels[labelled]
    chosen = np.flatnonzero(held_out[labelled])
    number = np.full(len(labels), -1)
    number[chosen] = np.arange(len(chosen))
    # A pair of two held-out utterances counts once; no utterance is paired with
    # itself.
    once = number[None] < np.arange(len(chosen))[:, None]
    same = (labels[chosen, None] == labels[None])[once]
    if same.all() or not same.any():
        return None
    return eer((unit[chosen] @ unit.T)[once], same)[1]


def pairs_eer(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Returns equal error rate, 0 to 1, and threshold of all pairs of parts.

    Takes embeddings (N, D) of two parts of each of N utterances, N from 2. Two
    parts of one utterance are a target trial, parts of different utterances a
    non-target trial.
    """
    scores = normalised(first) @ normalised(second).T
    return eer(scores.ravel(), np.eye(len(scores), dtype=bool).ravel())


def _draw(manifest, share, seed, labelled):
    """Draws rows that were trained on, and rows that were held out."""
    rows = held_out(len(manifest), share, seed, labelled)
    rng = np.random.default_rng(seed)
    return [rng.permutation(part)[:SAMPLE] for part in rows]


def _embed_halves(extract, manifest, rows):
    """Embeds first and second halves; drops utterances if a half fails."""
    twice, half = rows.repeat(2), np.tile([0, 1], len(rows))
    whole = manifest.take(twice)
    seconds = whole.durations / 2
    halves = dataclasses.replace(
        whole,
        ids=Strings(f"{n} {row}" for n, row in zip(half, twice)),
        offsets=whole.offsets + half * seconds,
        durations=seconds,
    )
    try:
        embedded, _ = extract(halves, np.arange(len(halves)))
    except BadAudio:  # all too short
        return [], []
    names = {*embedded.utterances}
    both = [row for row in rows if {f"0 {row}", f"1 {row}"} <= names]
    return [
        embedded.vectors_of([f"{half} {row}" for row in both])
        for half in (0, 1)
    ]
