#!/usr/bin/env python3
"""Measures `lgl who`, without and with --labels, where speakers are known.

> python benchmarks/who.py results/lgl/1/export/iter1 an4_sessions/test \
    --speakers=5 --utterances=5 --wrong=0.1

The folder has a sub-folder for each speaker. Without labels, all utterances of
so many speakers, drawn again and again, are sorted, as `lgl who` does it and by
the threshold alone. B-cubed F (Bagga and Baldwin 1998) is the harmonic mean of
two means over files: the share of its group that has the file's speaker, and
the share of its speaker's files that is in its group.

With labels, some speakers are drawn, and some utterances of each are labelled;
a share of these gets the name of another one of the drawn. The other utterances
are to be named, or, of other speakers, to be told as strangers. The threshold
is the encoder's, or found by halves of utterances, without labels.
"""

import pathlib
import tempfile

import common
import numpy as np

from lgl_plugin.clustering.average import average_linkage
from lgl_plugin.clustering.vectors import normalised
from lgl_plugin.dataio.given import GivenLabels
from lgl_plugin.inference.folder import embed_folder
from lgl_plugin.inference.speakers import calibrated, find_speakers, group_files


def main():
    """Prints the means over all draws."""
    parser = common.arguments(__doc__, repeats=False)
    parser.add_argument("encoder", type=pathlib.Path)
    parser.add_argument("audio", type=pathlib.Path)
    parser.add_argument("--speakers", type=int, default=5)
    parser.add_argument("--utterances", type=int, default=5)
    parser.add_argument("--wrong", type=float, default=0.1)
    parser.add_argument("--draws", type=int, default=50)
    parser.add_argument("--work", type=pathlib.Path)
    options = parser.parse_args()
    work = options.work or pathlib.Path(tempfile.mkdtemp())
    audio, device = options.audio, options.device
    manifest, found = embed_folder(options.encoder, audio, work, device, 0)
    limit, _ = calibrated(options.encoder, manifest, device)
    names = [name.split("/")[0] for name in found.utterances]
    _, truth = np.unique(names, return_inverse=True)
    rows = list(unlabelled(options.draws // 5, found.vectors, limit, truth))
    common.report(rows, "without labels", options.json, device)
    draws = [
        draw(options, manifest, found, limit, truth, np.random.default_rng(n))
        for n in range(options.draws)
    ]
    row = {key: float(np.mean([d[key] for d in draws])) for key in draws[0]}
    common.report([row], "with labels", device=device)


def unlabelled(draws, vectors, limit, truth):
    """Yields how well files of more and more speakers are sorted."""
    everyone = truth.max() + 1
    for number in (1, 2, 5, 10, 20, 50, everyone):
        figures = []
        if number > everyone:
            continue
        for seed in range(draws if number < everyone else 1):
            speakers = np.random.default_rng(seed).permutation(everyone)
            some = np.isin(truth, speakers[:number])
            unit, theirs = normalised(vectors[some]), truth[some]
            ours, _ = group_files(unit, limit)
            plain = average_linkage(unit, limit)
            figures.append(
                [
                    *(ours.max() + 1, bcubed(theirs, ours)),
                    *(plain.max() + 1, bcubed(theirs, plain)),
                ]
            )
        names = "found", "F %", "found by threshold", "F % by threshold"
        means = np.mean(figures, axis=0).tolist()
        yield {"speakers": int(number), **dict(zip(names, means))}


def bcubed(truth, labels):
    """The B-cubed F of groups, in per cent."""
    counts = np.zeros((truth.max() + 1, labels.max() + 1))
    np.add.at(counts, (truth, labels), 1)
    of_groups, of_speakers = counts.sum(0), counts.sum(1, keepdims=True)
    pure = (counts**2 / of_groups).sum() / len(truth)
    whole = (counts**2 / of_speakers.clip(min=1)).sum() / len(truth)
    return 100 * 2 * pure * whole / (pure + whole)


def draw(options, manifest, found, limit, truth, rng):
    """Labels some utterances, some wrongly, and compares what comes of it."""
    chosen = rng.permutation(truth.max() + 1)[: options.speakers]
    given = np.full(len(truth), -1)
    for label, speaker in enumerate(chosen):
        members = rng.permutation(np.flatnonzero(truth == speaker))
        given[members[: options.utterances]] = label
    known = np.flatnonzero(given >= 0)
    n_wrong = round(options.wrong * len(known))
    wrong = rng.choice(known, n_wrong, replace=False)
    shift = rng.integers(1, options.speakers, n_wrong)
    given[wrong] = (given[wrong] + shift) % options.speakers
    by_row = np.full(len(manifest), -1)
    by_row[manifest.rows(found.utterances)] = given
    labels = GivenLabels(tuple(map(str, chosen)), by_row)
    speech = find_speakers(
        options.encoder, manifest, found, limit, given=labels
    )
    named = np.append(chosen, -1)[np.minimum(speech.labels, options.speakers)]
    free, theirs = given < 0, np.isin(truth, chosen)
    listed = speech.named.wrong
    return {
        "named right %": 100 * np.mean((named == truth)[free & theirs]),
        "named wrong %": 100
        * np.mean(((named != truth) & (named >= 0))[free & theirs]),
        "strangers told %": 100 * np.mean((named < 0)[free & ~theirs]),
        "wrong labels found %": 100 * np.mean(np.isin(wrong, listed)),
        "right labels listed %": 100
        * np.mean(np.isin(np.setdiff1d(known, wrong), listed)),
    }


if __name__ == "__main__":
    main()
