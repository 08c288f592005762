"""Names the speakers of files from a user's labels of a few files."""

import dataclasses

import numpy as np

from lgl_plugin.clustering.average import average_linkage


@dataclasses.dataclass(frozen=True)
class Named:
    """Files sorted by speaker, with the evidence.

    `labels`, int64 (N,), are the given speaker, else the nearest speaker, else
    a stranger, numbered after the speakers. `heard` is the labelled speaker
    that a file sounds like without its own label, -1 for a stranger. `own` is
    the median cosine with other files of the same label, `other` with files of
    the nearest other speaker, float32 (N,), NaN if there are no such files.
    `wrong`, int64 (n,), are the files whose label looks wrong, clearest first.
    """

    labels: np.ndarray
    heard: np.ndarray
    own: np.ndarray
    other: np.ndarray
    wrong: np.ndarray


def name_files(
    vectors: np.ndarray,
    given: np.ndarray,
    threshold: float,
    device: str = "cpu",
) -> Named:
    """Names files by the speaker whose labelled files are nearest.

    Takes unit vectors (N, D), float32, and given speakers, int64 (N,), from 0
    without gaps, -1 for unknown. A file is a speaker's if its median cosine
    with the speaker's files is `threshold` or more; a mean would follow wrong
    labels. The other files are clustered as strangers, by average linkage. A
    label looks wrong if the file would get another name without the label. A
    speaker's only file has no other file to match, so that its label is doubted
    only if it sounds like another speaker.
    """
    labelled = np.flatnonzero(given >= 0)
    n_speakers = int(given.max()) + 1
    cosines = np.empty((len(vectors), n_speakers), np.float32)
    for speaker in range(n_speakers):
        members = np.flatnonzero(given == speaker)
        each = vectors @ vectors[members].T
        cosines[:, speaker] = np.median(each, axis=1)
        for place, row in enumerate(members):  # without the file itself
            rest = np.delete(each[row], place)
            cosines[row, speaker] = np.median(rest) if len(rest) else -np.inf
    heard = cosines.argmax(axis=1)
    heard[cosines.max(axis=1) < threshold] = -1
    labels = np.where(given >= 0, given, heard)
    strangers = np.flatnonzero(labels < 0)
    if len(strangers):
        joined = average_linkage(vectors[strangers], threshold, device)
        labels[strangers] = n_speakers + joined
    own = np.full(len(vectors), np.nan, np.float32)
    named = np.flatnonzero(labels < n_speakers)
    own[named] = cosines[named, labels[named]]
    cosines[named, labels[named]] = -np.inf
    other = cosines.max(axis=1)
    alone = np.isinf(own)
    wrong = labelled[heard[labelled] != given[labelled]]
    wrong = wrong[~(alone[wrong] & (heard[wrong] < 0))]
    rival = np.where(heard < 0, np.float32(threshold), other)
    margin = np.nan_to_num(own, neginf=-1) - rival
    own[alone] = np.nan
    return Named(
        labels,
        heard,
        own,
        np.where(np.isinf(other), np.float32(np.nan), other),
        wrong[np.argsort(margin[wrong], kind="stable")],
    )
