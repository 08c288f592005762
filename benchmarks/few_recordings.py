#!/usr/bin/env python3
"""Measures `lgl adapt`'s verdict on few recordings, whose speakers are known.

> python benchmarks/few_recordings.py results/lgl/1/export/iter1 \
    an4_sessions/train --threads=1

The folder has a sub-folder for each speaker. Few recordings of few speakers
are drawn again and again. Each back-end is fitted on them and judged by them
against the encoder as it came; `lgl adapt` judges against the best so far. The
truth is the change of the EER over all pairs of other speakers' recordings.
"""

import pathlib
import tempfile

import common
import numpy as np

from lgl_plugin.adaptation.rungs import BACKENDS
from lgl_plugin.adaptation.verdict import count_speakers, judge
from lgl_plugin.inference.folder import embed_folder
from lgl_plugin.metrics.error_rates import eer

# Speakers, and recordings of each.
SIZES = [
    *((1, 40), (2, 20), (3, 10)),
    *((5, 6), (10, 3), (5, 12), (12, 5), (20, 3)),
    *((10, 10), (20, 5), (33, 3), (20, 7), (60, 1)),
]
# Recordings of other speakers, of whom there must be some.
TESTED, OTHERS = 800, 10


def main():
    """Prints for each size how many draws were judged, and how rightly."""
    parser = common.arguments(__doc__, repeats=False)
    parser.add_argument("encoder", type=pathlib.Path)
    parser.add_argument("audio", type=pathlib.Path)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--work", type=pathlib.Path)
    options = parser.parse_args()
    work = options.work or pathlib.Path(tempfile.mkdtemp())
    _, found = embed_folder(
        options.encoder, options.audio, work, options.device, 0
    )
    names = [name.split("/")[0] for name in found.utterances]
    _, truth = np.unique(names, return_inverse=True)
    rows = []
    for speakers, each in SIZES:
        if speakers > truth.max() + 1 - OTHERS:
            continue
        draws = [
            draw(found.vectors, truth, speakers, each, np.random.default_rng(n))
            for n in range(options.draws)
        ]
        rows.append({"speakers": speakers, **summary(draws)})
    common.report(rows, "few recordings", options.json, options.device)


def draw(vectors, truth, n_speakers, each, rng):
    """Draws recordings; returns their number, groups, verdicts and truths."""
    speakers = rng.permutation(truth.max() + 1)[:n_speakers]
    drawn = np.concatenate(
        [rng.permutation(np.flatnonzero(truth == s))[:each] for s in speakers]
    )
    others = rng.permutation(np.flatnonzero(~np.isin(truth, speakers)))[:TESTED]
    few, verdicts = vectors[drawn], []
    backends = [make().fit(few) for make in BACKENDS.values()]
    try:
        groups = count_speakers(few)
        signs = [judge(few, adapt(few), groups).sign for adapt in backends]
    except ValueError:
        return len(few), None, verdicts
    before = all_pairs(vectors[others], truth[others])
    for sign, adapt in zip(signs, backends):
        after = all_pairs(adapt(vectors[others]), truth[others])
        verdicts.append((sign, after - before))
    return len(few), groups, verdicts


def all_pairs(vectors, truth):
    """The EER in per cent over all pairs."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    first, second = np.triu_indices(len(unit), 1)
    scores = (unit @ unit.T)[first, second]
    return 100 * eer(scores, truth[first] == truth[second])[0]


def summary(draws):
    """Counts what was judged, and how rightly, over the draws of a size."""
    groups = [found for _, found, _ in draws if found is not None]
    verdicts = [pair for _, _, found in draws for pair in found]
    sign, change = np.array(verdicts).reshape(-1, 2).T
    better = sign < 0
    return {
        "recordings": float(np.mean([number for number, _, _ in draws])),
        "judged": len(groups),
        "groups": f"{min(groups)} to {max(groups)}" if groups else "",
        "better": int(better.sum()),
        "of these truly worse": int((better & (change > 0)).sum()),
        "worse": int((sign > 0).sum()),
        "no difference": int((sign == 0).sum()),
        "true change": float(change.mean()) if len(change) else np.nan,
    }


if __name__ == "__main__":
    main()
