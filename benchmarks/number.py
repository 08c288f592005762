#!/usr/bin/env python3
"""The number of clusters: how far off the estimate is.

> python benchmarks/number.py --threads=1
> python benchmarks/number.py --threads=1 --run results/lgl/1 results/lgl/2

Embeddings are generated: 30 to 150 speakers, 10 to 150 utterances each, spread
little and much, sizes unequal or very unequal, with and without five sessions
a speaker. "off" is 2 to the mean of |log2(found / true)|, so that 1.5 says half
too many or a third too few; then the median, the lowest and the highest of
found / true. --run asks the same of runs whose manifest names speakers, by
their first iteration's embeddings; nobody should choose a rule by that.
"""

import pathlib
import statistics

import common
import numpy as np

from lgl_plugin.clustering.kmeans import TorchKMeans
from lgl_plugin.clustering.number import FIRST_STEP, estimate
from lgl_plugin.dataio.manifest import run_manifest
from lgl_plugin.inference.store import Embeddings
from lgl_plugin.runs.state import read_state

# Speakers, utterances of each.
CORPORA = [(30, 10), (30, 40), (30, 150), (150, 10), (150, 40), (60, 100)]
KINDS = [  # spread of utterances, of the logarithm of sizes, of sessions
    (0.3, 0.5, 0.0),
    (0.7, 0.5, 0.0),
    (1.1, 0.5, 0.0),
    (0.7, 1.0, 0.0),
    (0.5, 0.5, 0.4),
    (0.5, 0.5, 0.8),
]


def corpus(speakers, each, spread, sizes, sessions, seed):
    """Embeddings (speakers * each, 192)."""
    rng = np.random.default_rng(seed)
    scales = (1 + np.arange(192, dtype=np.float32)) ** -0.5
    share = rng.lognormal(0, sizes, speakers)
    # Nobody is there by one utterance only.
    whose = np.repeat(np.arange(speakers), 2)
    others = rng.choice(speakers, speakers * (each - 2), p=share / share.sum())
    whose = np.concatenate([whose, others])
    session = 5 * whose + rng.integers(5, size=len(whose))

    def drawn(rows):
        return scales * rng.standard_normal((rows, 192), np.float32)

    return (
        drawn(speakers)[whose]
        + sessions * drawn(5 * speakers)[session]
        + spread * drawn(len(whose))
    )


def row(name, corpora):
    """How the estimates for corpora compare with their speakers."""
    kmeans = TorchKMeans(FIRST_STEP)
    ratios = [estimate(kmeans, x).n_clusters / k for x, k in corpora]
    return {
        "corpora": name,
        "off": float(2 ** np.mean(np.abs(np.log2(ratios)))),
        "median": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def of_run(folder):
    """A run's embeddings, and how many speakers its manifest names."""
    found = Embeddings.load(pathlib.Path(folder) / "iter1" / "embeddings")
    settings = read_state(folder)["settings"]["stage 2"]
    manifest = run_manifest(pathlib.Path(folder), settings)
    speakers = manifest.speakers[manifest.rows(found.utterances)]
    known = speakers >= 0  # else one more would be counted, of all unknown
    vectors = np.array(found.vectors[known], np.float32)
    return vectors, len(np.unique(speakers[known]))


if __name__ == "__main__":
    parser = common.arguments(__doc__, device=False, repeats=False)
    parser.add_argument("--run", nargs="+", help="folders of runs")
    options = parser.parse_args()
    if options.run:
        groups = {"runs": [of_run(folder) for folder in options.run]}
    else:
        groups = {
            "spread {}, sizes {}, sessions {}".format(*kind): [
                (corpus(k, each, *kind, seed=7 * place + k), k)
                for k, each in CORPORA
            ]
            for place, kind in enumerate(KINDS)
        }
    rows = [row(name, corpora) for name, corpora in groups.items()]
    rows.append(row("all", sum(groups.values(), [])))
    common.report(rows, "Number of clusters, found / true", options.json)
