"""Finds who speaks in which file, by clusters of embeddings or few labels."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
import torch

from lgl_plugin.clustering.average import average_linkage
from lgl_plugin.clustering.clearest import clearest_clusters, silhouettes
from lgl_plugin.clustering.vectors import largest_first, normalised
from lgl_plugin.clustering.ward import ward
from lgl_plugin.dataio.given import GivenLabels
from lgl_plugin.dataio.manifest import Manifest
from lgl_plugin.inference.backends import Centring
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
        The speaker of each file, int64 (N,), from 0, in the order of decreasing
        numbers of files.
    confidence : numpy.ndarray
        The silhouettes, from -1 to 1, float32 (N,). For a speaker's only file
        the distance to files of the same speaker is that of the threshold.
    rule : str
        How the number of speakers was found, in words.
    names : sequence of str
        The names of the first speakers, if there are labels.
    named : Named, optional
        The evidence, if there are labels.

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
        """Returns a speaker's name, or a number from 1."""
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
    """Clusters files by speaker, and finds the number of speakers.

    The method depends on what is given:

    - Nothing: average linkage on the cosine of centred embeddings, with the
      number of groups that has the best silhouette. The encoder's threshold
      only tells whether all files have one speaker, or each file another.
    - `threshold`: average linkage up to that average cosine.
    - `n_speakers`: Ward's method on unit vectors.
    - `given`, labels of some files: `name_files` names the others by the
      threshold.

    Arguments
    ---------
    encoder : str or pathlib.Path
        The exported folder that made the embeddings.
    manifest, embeddings
        Of the folder's files, see `embed_folder`.
    threshold : float, optional
        The average cosine from which on two groups are one speaker. By default
        the encoder's threshold, or, if its folder has none, one that is found
        by halves of these files.
    n_speakers : int, optional
        The number of speakers, if it is known.
    device : str
        Where to cluster.
    given : GivenLabels, optional
        The speakers of some files, by the manifest's rows.
    num_workers : int, optional
        As of `embed_folder`, for the search for a threshold.
    store : pathlib.Path, optional
        The folder of `embed_folder`. It then keeps a threshold that was found,
        for the next call.

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
    named, points = None, vectors
    if n_speakers is not None:
        if not 1 <= n_speakers <= len(vectors):
            raise ValueError(
                f"--speakers={n_speakers} must be from 1 to {len(vectors)}, "
                "the number of files that could be embedded"
            )
        on_device = torch.from_numpy(vectors).to(device)
        weights = torch.ones(len(on_device), device=device)
        labels = largest_first(ward(on_device, weights).cut(n_speakers))
        rule, limit = f"Ward's method to {n_speakers} speakers", None
    else:
        limit, origin = threshold, "given"
        if limit is None:
            limit, origin = calibrated(
                encoder, manifest, device, num_workers, store
            )
        rule = f"average linkage at a cosine of {limit:.3f} ({origin})"
        if given is not None:
            named = name_files(vectors, given.of(rows), limit, device)
            labels = named.labels
            rule = f"labels, and {rule}"
        elif threshold is not None:
            labels = average_linkage(vectors, limit, device)
        else:
            labels, points = group_files(vectors, limit, device)
            if points is not vectors:
                rule, limit = "the clearest groups, by silhouette", None
    return Speakers(
        list(embeddings.utterances),
        manifest.durations[rows],
        labels,
        silhouettes(points, labels, 1.0 if limit is None else 1 - limit),
        rule,
        given.speakers if given else (),
        named,
    )


def group_files(
    vectors: np.ndarray, threshold: float, device: str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """Sorts files by speaker if the number of speakers is not known.

    A threshold that is slightly too low would join most speakers of a large
    folder. So the threshold only tells whether all files have one speaker, or
    each file another. Otherwise the clearest groups are taken.

    Takes unit vectors (N, D). Returns labels, int64 (N,), and the vectors that
    were grouped: the given ones, or centred ones. They are centred because
    embeddings of many encoders have a large common part, with which two large
    groups would look clearer than many small ones.
    """
    labels = average_linkage(vectors, threshold, device)
    if not 0 < labels.max() < len(labels) - 1:
        return labels, vectors
    centred = normalised(Centring().fit_transform(vectors))
    return clearest_clusters(centred, device), centred


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

    The cosines are medians over the files of the file's own label, and over
    those of the nearest other label; empty if there are none.
    """
    named = speech.named
    assert named is not None
    header = ["file", "label", "sounds_like", "cosine_label", "cosine_other"]
    rows = (
        [
            speech.files[row],
            speech.names[speech.labels[row]],
            sounds_like(speech, row),
            *(
                "" if np.isnan(cosine) else f"{cosine:.3f}"
                for cosine in (named.own[row], named.other[row])
            ),
        ]
        for row in named.wrong
    )
    write_csv(path, [header, *rows])


def sounds_like(speech: Speakers, row: int) -> str:
    """Returns the labelled speaker that a file sounds like."""
    assert speech.named is not None
    heard = speech.named.heard[row]
    return "a stranger" if heard < 0 else speech.names[heard]


def by_speaker(speech: Speakers) -> np.ndarray:
    """Returns the rows of files by speaker, each speaker's clearest first."""
    return np.lexsort((-speech.confidence, speech.labels))


def calibrated(
    encoder: str | pathlib.Path,
    manifest: Manifest,
    device: str = "cpu",
    num_workers: int | None = None,
    store: pathlib.Path | None = None,
) -> tuple[float, str]:
    """Returns the encoder's threshold, or one from these files; its origin.

    `store`, a folder of `embed_folder`, keeps a threshold that was found.
    Raises ValueError if none can be found.
    """
    threshold = read_threshold(encoder)
    if threshold is not None:
        return threshold, "the encoder's"

    def find():
        extract = load_extractor(encoder, device, num_workers)
        return threshold_by_halves(extract, manifest, share=0.5, seed=0)

    made_from = read_json(store / RECORD) if store is not None else {}
    if store is not None and made_from:
        threshold = kept_threshold(store / THRESHOLD, made_from, find)
    else:
        threshold = find()
    if threshold is None:
        raise ValueError(
            f"{encoder} names no threshold, and none can be found with so few "
            "files: say one by --threshold, or the number by --speakers"
        )
    return threshold, "found by halves of these files"
