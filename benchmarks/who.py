#!/usr/bin/env python3
"""Measures `lgl who --labels` where all speakers are known.

> python benchmarks/who.py results/lgl/1/export/iter2 an4_sessions/test \
    --speakers=5 --utterances=5 --wrong=0.1

The folder has a sub-folder for each speaker. Again and again some speakers are
drawn, and some utterances of each are labelled; a share of these gets the name
of another one of the drawn. The other utterances are to be named, or, of other
speakers, to be told as strangers. The threshold is the encoder's, or found by
halves of utterances, without labels.
"""

import pathlib
import tempfile

import common
import numpy as np

from lgl_plugin.dataio.given import GivenLabels
from lgl_plugin.inference.folder import embed_folder
from lgl_plugin.inference.speakers import calibrated, find_speakers


def main():
    """Prints the means over all draws."""
    parser = common.arguments(__doc__)
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
    draws = [
        draw(options, manifest, found, limit, truth, np.random.default_rng(n))
        for n in range(options.draws)
    ]
    row = {key: float(np.mean([d[key] for d in draws])) for key in draws[0]}
    common.report([row], "who", options.json, device)


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
