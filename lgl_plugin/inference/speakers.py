"""Who speaks in which file: clusters of embeddings, or few labels."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
import torch

from lgl_plugin.clustering.average import average_linkage
from lgl_plugin.clustering.vectors import largest_first, normalised
from lgl_plugin.clustering.ward import ward
from lgl_plugin.dataio.given import GivenLabels
from lgl_plugin.dataio.manifest import Manifest
from lgl_plugin.inference.calibration import (
    THRESHOLD,
    kept_threshold,
    threshold_by_halves,
)
from lgl_plugin.inference.extractor import load_extractor
from lgl_plugin.inference.folder import RECORD, read_threshold
from lgl_plugin.inference.naming import Named, name_files
from lgl_plugin.inference.store import Embeddings
from lgl_plugin.utils.files import read_json
from lgl_plugin.utils.tables import write_csv

# Cosines of files with speakers that are held at once: 64 MiB.
COSINES = 2**24


@dataclasses.dataclass(frozen=True)
class Speakers:
    """The files of a folder, sorted by speaker.

    Arguments
    ---------
    files : sequence of str
        Paths below the folder of audio.
    seconds : numpy.ndarray
        Their durations, float64 (N,).
    labels : numpy.ndarray
        The speaker of each, int64 (N,), from 0, the one of most files first.
    confidence : numpy.ndarray
        From -1 to 1, float32 (N,), see `confidences`.
    rule : str
        How the number of speakers was found, in words.
    names : sequence of str
        Those of the first speakers, who are named by labels.
    named : Named, optional
        The evidence, where there are labels.

    Example
    -------
    >>> labels, confidence = np.array([0, 1, 0]), np.float32([0.9, 1.0, 0.8])
    >>> speech = Speakers("abc", np.ones(3), labels, confidence, "given")
    >>> speech.n_speakers
    2
    """

    files: Sequence[str]
    seconds: np.ndarray
    labels: np.ndarray
    confidence: np.ndarray
    rule: str
    names: Sequence[str] = ()
    named: Named | None = None

    @property
    def n_speakers(self) -> int:
        """Counts the speakers."""
        return int(self.labels.max()) + 1

    def name(self, label: int) -> str:
        """Returns what a speaker is called: a name, or a number from 1."""
        if self.named is None:
            return str(label + 1)
        strange = label - len(self.names)
        return self.names[label] if strange < 0 else f"stranger {strange + 1}"


def find_speakers(
    encoder: str | pathlib.Path,
    manifest: Manifest,
    embeddings: Embeddings,
    threshold: float | None = None,
    n_speakers: int | None = None,
    device: str = "cpu",
    given: GivenLabels | None = None,
    num_workers: int | None = None,
    store: pathlib.Path | None = None,
) -> Speakers:
    """Clusters files by speaker; the number of speakers follows.

    Average linkage on the cosine, cut at the encoder's threshold; or, for a
    given number of speakers, Ward's method on unit vectors. With labels of
    some files `name_files` names the others by that threshold.

    Arguments
    ---------
    encoder : str or pathlib.Path
        The exported folder that made the embeddings.
    manifest, embeddings
        Of the folder's files, see `embed_folder`.
    threshold : float, optional
        Average cosine from which on two groups are one speaker. By default
        the encoder's; where its folder names none, one found by halves of
        these files.
    n_speakers : int, optional
        The number of speakers, if it is known.
    device : str
        Where to cluster.
    given : GivenLabels, optional
        The speakers of some files, by the manifest's rows.
    num_workers : int, optional
        As of `embed_folder`, for the search for a threshold.
    store : pathlib.Path, optional
        The folder of `embed_folder`, which then keeps a threshold that was
        found: the same call again need not search.

    Raises
    ------
    ValueError
        If there are fewer files than speakers, or no threshold can be found.

    Example
    -------
    >>> manifest = Manifest.of([(n, n, 0.0, 2.0, "") for n in "abcd"])
    >>> vectors = np.float32([[1, 0], [0, 1], [5, 1], [2, 0]])
    >>> embeddings = Embeddings(manifest.ids, vectors)
    >>> speech = find_speakers("none", manifest, embeddings, threshold=0.8)
    >>> dict(zip(speech.files, speech.labels.tolist()))
    {'a': 0, 'b': 1, 'c': 0, 'd': 0}
    """
    vectors = normalised(embeddings.vectors)
    rows = manifest.rows(embeddings.utterances)
    named = None
    if n_speakers is not None:
        if not 1 <= n_speakers <= len(vectors):
            raise ValueError(
                f"--speakers={n_speakers} must be from 1 to {len(vectors)}, "
                "the number of files that could be embedded"
            )
        points = torch.from_numpy(vectors).to(device)
        weights = torch.ones(len(points), device=device)
        labels = largest_first(ward(points, weights).cut(n_speakers))
        rule, limit = f"Ward's method to {n_speakers} speakers", None
    else:
        limit, origin = threshold, "given"
        if limit is None:
            limit, origin = calibrated(
                encoder, manifest, device, num_workers, store
            )
        rule = f"average linkage at a cosine of {limit:.3f} ({origin})"
        if given is None:
            labels = average_linkage(vectors, limit, device)
        else:
            named = name_files(vectors, given.of(rows), limit, device)
            labels = named.labels
            rule = f"labels, and {rule}"
    return Speakers(
        list(embeddings.utterances),
        manifest.durations[rows],
        labels,
        confidences(vectors, labels, limit),
        rule,
        given.speakers if given else (),
        named,
    )


def confidences(
    vectors: np.ndarray, labels: np.ndarray, threshold: float | None = None
) -> np.ndarray:
    """Computes how clearly each file belongs to its speaker, float32 (N,).

    The silhouette (Rousseeuw 1987) of the cosine distance, by average linkage:
    (b - a) / max(a, b), with a the mean distance to the speaker's other files
    and b that to the files of the nearest other speaker, 1 if there is none. A
    speaker's only file has the threshold's distance for a, the largest at which
    it would have been joined, or 1. Takes unit vectors (N, D) and labels (N,)
    from 0, none empty.
    """
    sizes = np.bincount(labels).astype(np.float32)
    sums = np.zeros((len(sizes), vectors.shape[1]), np.float32)
    np.add.at(sums, labels, vectors)
    confidence = np.empty(len(vectors), np.float32)
    alone = 1.0 if threshold is None else 1.0 - threshold
    block = max(1, COSINES // len(sizes))
    for start in range(0, len(vectors), block):
        own = labels[start : start + block]
        rows = np.arange(len(own))
        cosines = vectors[start : start + block] @ sums.T
        # Without the file itself, whose cosine with itself is 1.
        others = np.maximum(sizes[own] - 1, 1)
        a = 1 - (cosines[rows, own] - 1) / others
        a[sizes[own] == 1] = alone
        cosines /= sizes
        cosines[rows, own] = -np.inf
        b = 1 - cosines.max(axis=1)
        b[np.isinf(b)] = 1.0  # there is no other speaker
        largest = np.maximum(np.maximum(a, b), 1e-6)
        confidence[start : start + block] = (b - a) / largest
    return confidence.clip(-1, 1)


def write_speakers(path: str | pathlib.Path, speech: Speakers) -> None:
    """Writes a csv of file, speaker, confidence and seconds, by speaker."""
    rows = (
        [
            speech.files[row],
            speech.name(speech.labels[row]),
            f"{speech.confidence[row]:.2f}",
            f"{speech.seconds[row]:.2f}",
        ]
        for row in by_speaker(speech)
    )
    write_csv(path, [["file", "speaker", "confidence", "seconds"], *rows])


def write_wrong(path: str | pathlib.Path, speech: Speakers) -> None:
    """Writes a csv of the labels that look wrong, the clearest case first.

    The cosines are medians over the files of a label: the file's own, and the
    nearest other one; empty where there are none.
    """
    found = speech.named
    assert found is not None
    header = ["file", "label", "sounds_like", "cosine_label", "cosine_other"]
    rows = (
        [
            speech.files[row],
            speech.names[speech.labels[row]],
            sounds_like(speech, row),
            *(
                "" if np.isnan(cosine) else f"{cosine:.3f}"
                for cosine in (found.own[row], found.other[row])
            ),
        ]
        for row in found.wrong
    )
    write_csv(path, [header, *rows])


def sounds_like(speech: Speakers, row: int) -> str:
    """Returns the labelled speaker that a file sounds like."""
    assert speech.named is not None
    heard = speech.named.heard[row]
    return "a stranger" if heard < 0 else speech.names[heard]


def by_speaker(speech: Speakers) -> np.ndarray:
    """Returns the rows of files by speaker, the clearest of each first."""
    return np.lexsort((-speech.confidence, speech.labels))


def calibrated(
    encoder: str | pathlib.Path,
    manifest: Manifest,
    device: str = "cpu",
    num_workers: int | None = None,
    store: pathlib.Path | None = None,
) -> tuple[float, str]:
    """Returns the encoder's threshold, or else one from the files at hand.

    With it comes its origin in words. `store`, a folder of `embed_folder`,
    keeps one that was found, with what the embeddings were made from. Raises
    ValueError if none can be found.
    """
    known = read_threshold(encoder)
    if known is not None:
        return known, "the encoder's"

    def find():
        extract = load_extractor(encoder, device, num_workers)
        return threshold_by_halves(extract, manifest, share=0.5, seed=0)

    made_from = read_json(store / RECORD) if store is not None else {}
    if store is not None and made_from:
        found = kept_threshold(store / THRESHOLD, made_from, find)
    else:
        found = find()
    if found is None:
        raise ValueError(
            f"{encoder} names no threshold, and none can be found with so few "
            "files: say one by --threshold, or the number by --speakers"
        )
    return found, "found by halves of these files"
