#!/usr/bin/env python3
"""The number of clusters: how far off each rule is, and what it hangs on.

> python benchmarks/elbow.py --threads=1
> python benchmarks/elbow.py --threads=1 --run results/lgl/1 results/lgl/2

The rules read one curve each: the elbow on three axes of K, that of the
logarithm of the sum of squares, the index of Calinski and Harabasz, and the
silhouette (simplified: distances to the two nearest centroids). Embeddings are
generated: 30 to 150 speakers, 10 to 150 utterances each, spread little and
much, sizes unequal or very unequal, with and without five sessions a speaker.

Each row is a rule on a grid. "off" is 2 to the mean of |log2(found / true)|,
so that 1.5 says half too many or a third too few; then the median, the lowest
and the highest of found / true. --run asks the same of runs whose manifest
names speakers, by their first iteration's embeddings; nobody should choose a
rule by that.
"""

import pathlib
import statistics

import common
import numpy as np
import torch

from lgl_plugin.clustering.elbow import SCALES, default_grid, elbow
from lgl_plugin.clustering.kmeans import TorchKMeans
from lgl_plugin.clustering.vectors import exact_matmul, normalised
from lgl_plugin.dataio.manifest import load_manifest
from lgl_plugin.inference.store import Embeddings

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
# Parts of the default grid: their ends, from N utterances of K speakers.
GRIDS = {
    "2 to N/2": lambda n, k: (2, n / 2),
    "2 to N/5": lambda n, k: (2, n / 5),
    "N/200 to N/2": lambda n, k: (n / 200, n / 2),
    "N/200 to N/5": lambda n, k: (n / 200, n / 5),
    "K/8 to 8K": lambda n, k: (k / 8, 8 * k),
}


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


def curves(embeddings, grid):
    """Sum of squares and simplified silhouette at each of a grid."""
    kmeans = TorchKMeans(1, max_points_per_centroid=len(embeddings))
    points = normalised(embeddings)
    with exact_matmul():
        runs = kmeans._train(points, grid.tolist())
    silhouette = []
    for centroids, _ in runs:
        nearest = np.partition(points @ centroids.T, -2, axis=1)[:, -2:]
        other, own = np.sqrt(2 - 2 * nearest.clip(max=1)).T
        silhouette.append(np.mean(1 - own / other.clip(min=1e-6)))
    return np.array([inertia[-1] for _, inertia in runs]), np.array(silhouette)


def rules(grid, inertia, silhouette, scatter, n):
    """Returns what each rule finds; nothing where the curve has no elbow."""
    between = (scatter - inertia) / (grid - 1) * (n - grid) / inertia
    found = {
        "Calinski-Harabasz": int(grid[between.argmax()]),
        "silhouette": int(grid[silhouette.argmax()]),
    }
    for scale in SCALES:
        for name, curve in (
            ("", inertia),
            (", log of the sum", np.log(inertia)),
        ):
            try:
                answer = elbow(grid, curve, scale)
            except ValueError:
                answer = int(grid[0])
            found[f"elbow, {scale} axis{name}"] = answer
    return found


def tried(embeddings, speakers):
    """Found / true for each grid and rule."""
    n = len(embeddings)
    grid = default_grid(n)
    inertia, silhouette = curves(embeddings, grid)
    points = normalised(embeddings)
    scatter = n * (1 - float(np.square(points.mean(axis=0)).sum()))
    ratios = {}
    for name, ends in GRIDS.items():
        low, high = ends(n, speakers)
        inside = (grid >= low) & (grid <= high)
        found = rules(
            grid[inside], inertia[inside], silhouette[inside], scatter, n
        )
        for rule, k in found.items():
            ratios[name, rule] = k / speakers
    return ratios


def table(all_ratios):
    """A row for each grid and rule."""
    rows = []
    for key in all_ratios[0]:
        ratios = [ratios[key] for ratios in all_ratios]
        rows.append(
            {
                "grid": key[0],
                "rule": key[1],
                "off": float(2 ** np.mean(np.abs(np.log2(ratios)))),
                "median": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
            }
        )
    return rows


def of_run(folder):
    """A run's embeddings, and how many speakers its manifest names."""
    found = Embeddings.load(pathlib.Path(folder) / "iter1" / "embeddings")
    manifest = load_manifest(pathlib.Path(folder) / "manifest.csv", "")
    speakers = manifest.speakers[manifest.rows(found.utterances)]
    return np.array(found.vectors, np.float32), len(np.unique(speakers))


if __name__ == "__main__":
    parser = common.arguments(__doc__)
    parser.add_argument("--run", nargs="+", help="folders of runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.run:
        corpora = [of_run(folder) for folder in options.run]
        title = f"{len(corpora)} runs"
    else:
        corpora = [
            (corpus(speakers, each, *kind, seed=7 * place + speakers), speakers)
            for place, kind in enumerate(KINDS)
            for speakers, each in CORPORA
        ]
        title = f"{len(corpora)} generated corpora"
    common.report(
        table([tried(*one) for one in corpora]),
        f"Number of clusters, found / true, {title}",
        options.json,
    )
