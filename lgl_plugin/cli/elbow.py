"""`lgl elbow`: estimates the number of speakers in a store of embeddings.

> lgl elbow results/lgl/1/iter1/embeddings --grid=50,100,200
"""

from __future__ import annotations

import argparse
import pathlib


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    parser.add_argument("embeddings", help="folder of a store")
    parser.add_argument(
        "--grid",
        type=lambda text: [int(k) for k in text.split(",")],
        help="numbers of clusters, such as 50,100,200; none: from 2 to N/2",
    )
    parser.add_argument(
        "--scale",
        choices=("root", "linear", "log"),
        default="root",
        help="of the axis of the numbers of clusters",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the k-means")
    parser.add_argument("--device", default="cpu", help="where to cluster")
    parser.add_argument(
        "--output", help="folder of the results; none: elbow beside the store"
    )


def run(
    embeddings: str,
    grid: list[int] | None,
    scale: str,
    seed: int,
    device: str,
    output: str | None,
) -> None:
    """Prints the estimate and writes elbow.json and its figure."""
    folder = pathlib.Path(embeddings)
    if not (folder / "vectors.npy").exists():
        raise FileNotFoundError(
            f"{folder} holds no embeddings: give the embeddings folder of one "
            "of a run's iterations, such as results/lgl/1/iter1/embeddings"
        )
    from lgl_plugin.clustering.elbow import below_chord, estimate_k
    from lgl_plugin.clustering.kmeans import TorchKMeans
    from lgl_plugin.inference.store import Embeddings
    from lgl_plugin.report.figures import elbow_figure, save
    from lgl_plugin.utils.files import write_json
    from lgl_plugin.utils.tables import markdown_table

    output = pathlib.Path(output or folder.resolve().parent / "elbow")
    vectors = Embeddings.load(folder).vectors
    kmeans = TorchKMeans(1, seed=seed, device=device)
    found = estimate_k(kmeans, vectors, grid, scale)
    distances = below_chord(found.grid, found.inertia, found.scale)
    rows = []
    for k, inertia, distance in zip(found.grid, found.inertia, distances):
        mark = " **elbow**" if k == found.n_clusters else ""
        rows.append([k, f"{inertia:.6g}", f"{distance:.3f}{mark}"])
    header = ["clusters", "sum of squares", "below the chord"]
    print(markdown_table(header, rows))
    facts = {
        "n_clusters": found.n_clusters,
        "grid": found.grid.tolist(),
        "inertia": found.inertia.tolist(),
        "scale": found.scale,
        "seed": seed,
        "utterances": len(vectors),
    }
    write_json(output / "elbow.json", facts)
    save(elbow_figure(found), output, "elbow")
    print(
        f"\n{found.n_clusters} clusters: {output / 'elbow.json'}, "
        f"{output / 'elbow.png'}, {output / 'elbow.svg'}"
    )
