"""`lgl count`: estimates the number of speakers in a store of embeddings.

> lgl count results/lgl/1/iter1/embeddings
"""

import argparse
import os
import pathlib


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    add = parser.add_argument
    add("embeddings", help="folder of a store")
    add("--seed", type=int, default=0, help="of the estimate")
    add("--device", default="cpu", help="where to cluster")
    add("--output", help="folder of the results; none: STORE_count beside it")


def run(embeddings: str, seed: int, device: str, output: str | None) -> None:
    """Prints the estimate and writes count.json and its figure."""
    folder = pathlib.Path(embeddings)
    if not (folder / "vectors.npy").exists():
        raise FileNotFoundError(
            f"{folder} holds no embeddings: give the embeddings folder of one "
            "of a run's iterations, such as results/lgl/1/iter1/embeddings"
        )
    from lgl_plugin.clustering.number import check_enough
    from lgl_plugin.inference.store import Embeddings
    from lgl_plugin.inference.ward_clusters import ward_estimate
    from lgl_plugin.report.figures import count_figure, save
    from lgl_plugin.utils.files import check_writable, read_json, write_json
    from lgl_plugin.utils.tables import markdown_table

    store = folder.resolve()
    results = pathlib.Path(output or store.with_name(f"{store.name}_count"))
    # By the way from one to the other, so that both can be moved.
    of = os.path.relpath(store, results.resolve())
    before = read_json(results / "count.json").get("store", of)
    if before != of:
        raise ValueError(
            f"{results} holds the count of another store, {before} from "
            "there: name another --output, or delete that one"
        )
    check_writable(results)  # before the clustering
    vectors = Embeddings.load(folder).vectors
    check_enough(len(vectors))
    found = ward_estimate(vectors, seed, device)
    found.warn_of_guess()
    k = found.n_clusters
    shown = [n for n in (k // 4, k // 2, k, 2 * k, 4 * k) if n >= 2]
    shown = [n for n in shown if n <= len(found.gap)]
    rows = [
        [n, *(f"{curve[n - 1]:.3f}" for curve in (found.explained, found.gap))]
        for n in shown
    ]
    print(markdown_table(["clusters", "explained", "beyond chance"], rows))
    facts = {
        "store": of,
        "n_clusters": k,
        "beyond_chance": float(found.gap[k - 1]),
        "seed": seed,
        "utterances": len(vectors),
    }
    write_json(results / "count.json", facts)
    save(count_figure(found), results, "count")
    print(
        f"\n{k} clusters: {results / 'count.json'}, "
        f"{results / 'count.png'}, {results / 'count.svg'}"
    )
