"""A decision threshold for cosine scores, found without labels.

SpeechBrain's `verify_batch` accepts a pair above a cosine of 0.25, which suits
the encoder that it was found for and no other. Two ways need no speaker's
name; `benchmarks/thresholds.py` measures how far off they are.
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
# Held-out utterances that a threshold is found with, and as many others.
SAMPLE = 1000


def find_threshold(
    extract: Callable,
    manifest: Manifest,
    share: float,
    seed: int,
    pseudo: tuple[Iterable[str], Iterable[int]] | None = None,
    labelled: ArrayLike = (),
) -> tuple[tuple[float, str] | None, np.ndarray]:
    """Finds an encoder's threshold with the utterances that trained it.

    By `pseudo`, utterance IDs and pseudo-labels, if there are any, else by
    halves of utterances; `share`, `seed` and `labelled` are those of the
    utterances held out, see `manifest.held_out`. Returns the threshold with the
    way it was found, "pseudo-labels" or "halves", or None; and embeddings,
    float32 (n, D), of the utterances that were drawn. BadAudio if none of them
    can be read.
    """
    train, aside = _draw(manifest, share, seed, labelled)
    drawn, _ = extract(manifest, np.concatenate([aside, train]))
    if pseudo is not None:
        wanted = set(drawn.utterances)
        label = {name: n for name, n in zip(*pseudo) if name in wanted}
        labels = [label.get(name, -1) for name in drawn.utterances]
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

    Arguments as of `find_threshold`, of which it embeds the halves alone. None
    if fewer than two utterances have two halves that can be embedded.
    """
    _, aside = _draw(manifest, share, seed, labelled)
    first, second = _embed_halves(extract, manifest, aside)
    # Halves share their session, and a short half scores lower than a whole
    # utterance: the two errors have opposite directions.
    return pairs_eer(first, second)[1] if len(first) >= 2 else None


def kept_threshold(
    path: pathlib.Path, made_from: Any, find: Callable[[], float | None]
) -> float | None:
    """Returns a threshold that an earlier call found, or else finds it.

    The file at `path` keeps it, with the plain data that it was `made_from`.
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
    (N,) of the utterances that no gradient was taken on. A pair is a target
    trial if both have one pseudo-label. One of each pair is held out: training
    has pulled the others to their pseudo-speaker's centre, so their pairs would
    put the threshold too high. None if the pairs are all of one kind.
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


def pairs_eer(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Returns equal error rate, 0 to 1, and threshold of all pairs of parts.

    Takes embeddings (N, D) of two parts of each of N utterances, N from 2.
    Parts of one are a target trial, parts of two a non-target trial.
    """
    scores = normalised(first) @ normalised(second).T
    return eer(scores.ravel(), np.eye(len(scores), dtype=bool).ravel())


def _draw(manifest, share, seed, labelled):
    """Draws rows that were trained on and rows that were held out."""
    rows = held_out(len(manifest), share, seed, labelled)
    rng = np.random.default_rng(seed)
    return [rng.permutation(part)[:SAMPLE] for part in rows]


def _embed_halves(extract, manifest, rows):
    """Returns embeddings of first and second halves, where both have one."""
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
