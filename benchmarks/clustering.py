#!/usr/bin/env python3
"""Clustering: what runs it, how fast, and how well it finds the speakers.

> python benchmarks/clustering.py
> python benchmarks/clustering.py --device=cuda --n=1092009 --k=6000
> python benchmarks/clustering.py --starts --repeats=5
> python benchmarks/clustering.py --two_step=5000
> python benchmarks/clustering.py --rivals sklearn speechbrain --threads=1

Embeddings are generated: K speakers of unequal sizes on the sphere, their
utterances around them, both with most variance in few dimensions. The floor
of an iteration is that of its products, 2 N K D operations, at the rate of
large float32 products, the highest measured between the runs. Rivals are
scikit-learn's k-means with as many iterations, and SpeechBrain's as it is, in
mini-batches until it improves no more; they get embeddings of length 1.
"""

import functools
import importlib.util
import statistics
import time
import types

import common
import numpy as np
import sklearn.cluster
import threadpoolctl
import torch
from sklearn.cluster import kmeans_plusplus
from sklearn.metrics import normalized_mutual_info_score as nmi
from speechbrain.integrations.audio_tokenizers.kmeans import (
    MiniBatchKMeansSklearn,
)

from lgl_plugin.clustering.kmeans import FaissKMeans, TorchKMeans
from lgl_plugin.clustering.two_step import TwoStepKMeans
from lgl_plugin.clustering.vectors import exact_matmul, normalised


class RandomStart(FaissKMeans):
    """From random points, as faiss does by itself."""

    def _first_centroids(self, points):
        rng = np.random.default_rng(self.seed)
        return points[rng.choice(len(points), self.n_clusters, replace=False)]


class SklearnStart(FaissKMeans):
    """From scikit-learn's greedy k-means++ on as many points as ours."""

    def _first_centroids(self, points):
        rng = np.random.default_rng(self.seed)
        size = min(len(points), 10 * self.n_clusters)
        some = points[rng.choice(len(points), size, replace=False)]
        return kmeans_plusplus(some, self.n_clusters, random_state=self.seed)[0]


class Rival:
    """A k-means of scikit-learn's form, perhaps behind SpeechBrain's."""

    def __init__(self, model):
        self.model = model

    def __call__(self, embeddings):
        points = torch.from_numpy(normalised(embeddings))
        self.model.fit(points)
        found = getattr(self.model, "kmeans", self.model)
        return types.SimpleNamespace(
            labels=found.labels_,
            centroids=normalised(found.cluster_centers_),
        )


# From a rival's name to what makes it by clusters, iterations and a seed.
RIVALS = {
    "sklearn": lambda k, iterations, seed: Rival(
        sklearn.cluster.KMeans(
            k, max_iter=iterations, tol=0, n_init=1, random_state=seed
        )
    ),
    "speechbrain": lambda k, iterations, seed: Rival(
        MiniBatchKMeansSklearn(k, random_state=seed)
    ),
}


def speakers(n, k, dimensions, spread, seed=0):
    """Embeddings (n, dimensions) of k speakers, and whose they are."""
    rng = np.random.default_rng(seed)
    scales = (1 + np.arange(dimensions, dtype=np.float32)) ** -0.5
    centres = rng.standard_normal((k, dimensions), np.float32) * scales
    sizes = rng.lognormal(0, 0.5, k)
    labels = rng.choice(k, n, p=sizes / sizes.sum())
    embeddings = rng.standard_normal((n, dimensions), np.float32)
    embeddings *= spread * scales
    for start in range(0, n, 65536):
        rows = slice(start, start + 65536)
        embeddings[rows] += centres[labels[rows]]
    return embeddings, labels


def matmul_rate(device):
    """Operations per second of large float32 products."""
    size = 2048 if device == "cpu" else 4096
    left, right = torch.randn(2, size, size, device=device)
    with exact_matmul():
        times = common.measure({"": lambda: left @ right}, 3, device)[""]
    return 2 * size**3 / times["lowest"]


def timed(method, seconds):
    """The method, which then also appends how long it took."""

    def call(*arguments):
        started = time.perf_counter()
        result = method(*arguments)
        seconds.append(time.perf_counter() - started)
        return result

    return call


def run(cluster, embeddings, labels, k, device):
    """One clustering: seconds of its parts, memory, quality."""
    kmeans = getattr(cluster, "kmeans", cluster)
    seeding, iterations = [], []
    if not isinstance(kmeans, Rival):
        kmeans._first_centroids = timed(kmeans._first_centroids, seeding)
        kmeans._iterate = timed(kmeans._iterate, iterations)
    common.reset_peaks(device)
    started, worked = time.perf_counter(), time.process_time()
    found = cluster(embeddings)
    total = time.perf_counter() - started
    worked = time.process_time() - worked
    return {
        "seeding": sum(seeding),
        "iterations": iterations,
        "total": total,
        "worked": worked,
        "inertia": inertia(embeddings, found),
        "nmi": nmi(labels, found.labels),
        "empty": k - len(np.unique(found.labels)),
        **common.peaks(device),
    }


def inertia(embeddings, found):
    """Sum of squared distances to the centroids of the labels."""
    total = 0.0
    for start in range(0, len(embeddings), 65536):
        rows = slice(start, start + 65536)
        lengths = np.linalg.norm(embeddings[rows], axis=1)
        cosines = (embeddings[rows] * found.centroids[found.labels[rows]]).sum(
            axis=1
        ) / lengths
        total += float((2 - 2 * cosines).sum(dtype=np.float64))
    return total


def row(name, runs, floor):
    """A line of the table from all runs of a variant."""

    def over_runs(key):
        return [run[key] for run in runs]

    figures = {"clustering": name}
    iterations = [t for times in over_runs("iterations") for t in times]
    if iterations:
        median = statistics.median(iterations)
        figures |= {
            "seeding s": statistics.median(over_runs("seeding")),
            "iteration s": median,
            "lowest": min(iterations),
            "highest": max(iterations),
            "floor s": floor,
            "times the floor": median / floor,
        }
    figures |= {
        "total s": statistics.median(over_runs("total")),
        "of a processor": statistics.median(over_runs("worked")),
        "inertia": statistics.mean(over_runs("inertia")),
        "NMI": f"{statistics.mean(over_runs('nmi')):.4f}",
        "NMI lowest-highest": f"{min(over_runs('nmi')):.4f}-"
        f"{max(over_runs('nmi')):.4f}",
        "empty": max(over_runs("empty")),
        "host MiB": max(over_runs("host_mib")),
    }
    if "gpu_mib" in runs[0]:
        figures["GPU MiB"] = max(over_runs("gpu_mib"))
    return figures


def variants(options):
    """Returns, by name, what makes a clustering by a seed."""
    backends = {f"torch {options.device}": TorchKMeans}
    if importlib.util.find_spec("faiss"):
        import faiss

        faiss.omp_set_num_threads(options.threads)
        on_gpu = options.device != "cpu"
        if not on_gpu or hasattr(faiss, "StandardGpuResources"):
            backends[f"faiss {options.device}"] = FaissKMeans
    if options.backend:
        backends = {
            name: backend
            for name, backend in backends.items()
            if name.startswith(options.backend)
        }
    starts = {}
    if options.starts:
        starts["faiss, random start"] = RandomStart
        starts["faiss, scikit-learn start"] = SklearnStart

    def kmeans(backend, n_clusters, seed):
        """A fresh instance with the settings of the command line."""
        return backend(
            n_clusters,
            n_iterations=options.iterations,
            max_points_per_centroid=options.n,
            seed=seed,
            device=options.device,
        )

    found = {
        name: lambda seed, backend=backend: kmeans(backend, options.k, seed)
        for name, backend in (backends | starts).items()
    }
    if options.two_step:
        for name, backend in backends.items():
            found[f"{name}, two steps"] = lambda seed, backend=backend: (
                TwoStepKMeans(
                    kmeans(backend, options.two_step, seed), options.k
                )
            )
    for name in options.rivals:
        found[name] = functools.partial(
            RIVALS[name], options.k, options.iterations
        )
    return found


def main(options):
    """Alternates the variants, a seed at a time, and reports them."""
    threadpoolctl.threadpool_limits(options.threads)
    embeddings, labels = speakers(
        options.n, options.k, options.dim, options.spread
    )
    makers = variants(options)
    runs = {name: [] for name in makers}
    rates = []
    for seed in range(options.repeats):
        rates.append(matmul_rate(options.device))
        for name, make in makers.items():
            runs[name].append(
                run(make(seed), embeddings, labels, options.k, options.device)
            )
    # Other jobs disturb a processor's time less than the clock's; but it does
    # not count what a GPU does.
    on_cpu = torch.device(options.device).type == "cpu"
    spent = "of a processor" if on_cpu else "total s"
    operations = 2 * options.n * options.dim
    rows = []
    for name in makers:
        two_steps = name.endswith("two steps")
        n_clusters = options.two_step if two_steps else options.k
        floor = operations * n_clusters / max(rates)
        rows.append(row(name, runs[name], floor))
        ratio = rows[-1][spent] / rows[0][spent]
        rows[-1]["times the first"] = ratio
    common.report(
        rows,
        f"k-means, {options.n} embeddings of {options.dim}, {options.k} "
        f"clusters, {options.iterations} iterations, spread {options.spread}, "
        f"{options.repeats} seeds",
        options.json,
        options.device,
    )


if __name__ == "__main__":
    parser = common.arguments(__doc__)
    parser.set_defaults(repeats=3)
    parser.add_argument("--n", type=int, default=20_000)
    parser.add_argument("--k", type=int, default=400)
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--iterations", type=int, default=25)
    parser.add_argument(
        "--spread", type=float, default=0.6, help="of a speaker's utterances"
    )
    parser.add_argument(
        "--starts", action="store_true", help="other first centroids as well"
    )
    parser.add_argument(
        "--two_step", type=int, help="clusters of the first of two steps"
    )
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=[])
    parser.add_argument("--backend", choices=("torch", "faiss"))
    main(parser.parse_args())
