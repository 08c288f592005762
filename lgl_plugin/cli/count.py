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
    # A relative path, so that results and store can be moved together.
    relative = os.path.relpath(store, results.resolve())
    before = read_json(results / "count.json").get("store", relative)
    if before != relative:
        raise ValueError(
            f"{results} holds the count of another store, {before} from "
            "there: name another --output, or delete that one"
        )
    check_writable(results)  # before the clustering
    vectors = Embeddings.load(folder).vectors
    check_enough(len(vectors))
    estimate = ward_estimate(vectors, seed, device)
    estimate.warn_of_guess()
    k, curves = estimate.n_clusters, (estimate.explained, estimate.gap)
    shown = [n for n in (k // 4, k // 2, k, 2 * k, 4 * k) if n >= 2]
    shown = [n for n in shown if n <= len(estimate.gap)]
    rows = [[n, *(f"{curve[n - 1]:.3f}" for curve in curves)] for n in shown]
    print(markdown_table(["clusters", "explained", "beyond chance"], rows))
    facts = {
        "store": relative,
        "n_clusters": k,
        "beyond_chance": float(estimate.gap[k - 1]),
        "seed": seed,
        "utterances": len(vectors),
    }
    write_json(results / "count.json", facts)
    save(count_figure(estimate), results, "count")
    print(
        f"\n{k} clusters: {results / 'count.json'}, "
        f"{results / 'count.png'}, {results / 'count.svg'}"
    )
