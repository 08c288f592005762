"""The part of a run's page on clusters: sizes, a map, files to listen to."""

from collections.abc import Iterator

import numpy as np

from lgl_plugin.dataio.manifest import find
from lgl_plugin.report import figures, projection
from lgl_plugin.report.page import Block, Figure, Recordings, Table
from lgl_plugin.report.results import Results
from lgl_plugin.runs.metrics_log import cells

MAP_GROUPS = len(figures.COLOURS)
CLUSTERS, FILES = 100, 5  # clusters that are listed, and files of each
QUARTILES = ("smallest", "25 %", "median", "75 %", "largest")
# Columns of the table: heading, factor and number of decimals.
CLUSTER_COLUMNS = {
    **{name: (name, 1, 0) for name in ("clusters", "empty", *QUARTILES)},
    "nmi": ("NMI", 1, 3),
    "ami": ("AMI", 1, 3),
    "purity": ("purity", 1, 3),
    "reliable_share": ("reliable %", 100, 0),
}


def clusters(results: Results) -> Iterator[Block]:
    """Yields the sizes of the clusters and their agreement with speakers."""
    sizes, rows = {}, {}
    for number in results.iterations:
        labelled = results.labels(number)
        if labelled is None:
            continue
        name = f"iteration {number}"
        step = results.done.get(f"iter{number}/labels", {})
        # `n_clusters` also counts clusters that stayed empty.
        counts = np.bincount(labelled[1], minlength=step.get("n_clusters", 0))
        quartiles = np.percentile(counts, [0, 25, 50, 75, 100]).astype(int)
        sizes[name] = counts
        rows[name] = {
            **results.rows.get(f"{name}, classifier", {}),
            **dict(zip(QUARTILES, quartiles)),
            "clusters": len(counts),
            "empty": (counts == 0).sum(),
        }
    if not sizes:
        return
    yield Table("Utterances per cluster", *cells([rows], CLUSTER_COLUMNS))
    if results.speakers_known:
        speakers = results.manifest.speakers
        sizes["true speakers"] = np.bincount(speakers[speakers >= 0])
    yield Figure(
        "cluster_sizes",
        figures.cluster_sizes(sizes),
        "Sizes of the clusters from the largest to the smallest: "
        + "; ".join(
            f"{name}, {len(counts):,} from {max(counts):,} to {min(counts):,}"
            for name, counts in sizes.items()
        ),
        "Utterances per cluster, from the largest cluster to the smallest.",
    )


def embedding_map(results: Results) -> Iterator[Block]:
    """Yields maps of the latest embeddings, by pseudo-label and by speaker."""
    for number in reversed(results.iterations):
        store, labelled = results.embeddings(number), results.labels(number)
        if store is not None and labelled is not None:
            break
    else:
        return
    utterances, labels = labelled
    if len(labels) < 5:
        return  # t-SNE needs neighbours
    largest = np.argsort(-np.bincount(labels), kind="stable")[:MAP_GROUPS]
    chosen = projection.sample(labels, largest)
    shown = [utterances[n] for n in chosen]
    points, spread = projection.project(store.vectors_of(shown))
    order = {cluster: index for index, cluster in enumerate(largest)}
    groups = np.array([order.get(label, -1) for label in labels[chosen]])
    names = [f"cluster {cluster}" for cluster in largest]
    drawn = f"{len(chosen):,} of {len(labels):,} utterances"
    seed = f" (seed {projection.SEED}; up to half from clusters in colour)"
    yield Figure(
        "map_clusters",
        figures.embedding_map(points, groups, names),
        f"Map of {drawn}, the {len(names)} largest clusters in colour.",
        f"By pseudo-label, iteration {number}: the {len(names)} largest "
        "clusters.",
        raster=True,
    )
    if results.speakers_known:
        rows = find(results.manifest.ids, shown)
        speakers = results.manifest.speakers[rows]
        colours = {}
        for index in range(len(names)):
            members = speakers[(groups == index) & (speakers >= 0)]
            if len(members):
                colours.setdefault(np.bincount(members).argmax(), index)
        by_speaker = np.array([colours.get(each, -1) for each in speakers])
        names = [f"speaker of {name}" for name in names]
        yield Figure(
            "map_speakers",
            figures.embedding_map(points, by_speaker, names),
            f"The same map; in colour, the main speakers of these clusters: "
            f"{len(colours)} speakers.",
            "By true speaker: the main speaker of each of these clusters, in "
            "the cluster's colour (the first one's, if it leads several).",
            raster=True,
        )
    yield (
        f"Drawn: {drawn}{seed if len(chosen) < len(labels) else ''}. "
        f"Unit length, principal components ({100 * spread:.0f} % of the "
        "variance), then t-SNE: neighbours mean something, distances between "
        "groups do not. The largest clusters need not be typical ones."
    )


def recordings(results: Results) -> Iterator[Block]:
    """Yields the largest clusters of the latest iteration, with some files."""
    for number in reversed(results.iterations):
        labelled = results.labels(number)
        if labelled is not None:
            break
    else:
        return
    utterances, labels = labelled
    counts = np.bincount(labels)
    order, ends = np.argsort(labels, kind="stable"), np.cumsum(counts)
    largest = np.argsort(-counts, kind="stable")[:CLUSTERS]
    chosen = {}
    for cluster in largest[counts[largest] > 0]:
        members = order[ends[cluster] - counts[cluster] : ends[cluster]]
        # Spread over the manifest: its first files may be of one session.
        places = np.linspace(0, len(members) - 1, FILES).astype(int)
        title = f"cluster {cluster}: {len(members):,} utterances"
        chosen[title] = [utterances[n] for n in members[np.unique(places)]]
    names = [name for group in chosen.values() for name in group]
    players = dict.fromkeys(names, "")
    if results.manifest is not None:
        rows = find(results.manifest.ids, names)
        players = {n: results.player(row) for n, row in zip(names, rows)}
    yield Recordings(
        f"{len(chosen):,} of {np.count_nonzero(counts):,} clusters, iteration "
        f"{number}, the largest first, with some of their files",
        {t: [(n, players[n]) for n in chosen[t]] for t in chosen},
    )
