"""Everything around the training, by the number of utterances N.

> python benchmarks/scaling.py --max=6 --json=scaling.json

N goes from 10^4 to 10^max, with VoxCeleb2's 182 utterances to a speaker, as
many clusters as speakers and a tenth of the pseudo-labels wrong. Each figure
comes from a process of its own, so that the peak of memory is its own; it
holds what the task is given, and about 0.4 GiB of imported libraries. The
exponent is that of the growth between the two largest N; beside it that of
N log N, no worse than which it should be.
"""

import csv
import gc
import math
import multiprocessing
import pathlib
import statistics
import tempfile
import time

import numpy as np
import torch
from common import arguments, peaks, report, reset_peaks
from sklearn.metrics import normalized_mutual_info_score

from lgl_plugin.dataio.labels import read_labels, write_labels
from lgl_plugin.dataio.manifest import COLUMNS, Strings, held_out, load_manifest
from lgl_plugin.evaluation import pseudo_labels
from lgl_plugin.inference.store import Embeddings
from lgl_plugin.metrics import agreement
from lgl_plugin.nnet.gates import DynamicGate, TargetShareGate
from lgl_plugin.nnet.mixture import fit_mixture
from lgl_plugin.runs import metrics_log
from lgl_plugin.runs.run import Run

SPEAKER = 182  # utterances, in VoxCeleb2


def names(n):
    """IDs like VoxCeleb2's, in random order."""
    for i in np.random.default_rng(0).permutation(n).tolist():
        yield f"id{i // SPEAKER:07d}/{i % SPEAKER:03d}/{i:08d}.wav"


def write_manifest(n, folder):
    """A manifest of n utterances, 8 s each."""
    with open(folder / "manifest.csv", "w", encoding="utf-8") as out:
        table = csv.writer(out)
        table.writerow(COLUMNS)
        table.writerows(
            (name, 8.0, f"$data_root/{name}", 0, 128000, name.split("/")[0])
            for name in names(n)
        )


def labels(n):
    """True speakers, pseudo-labels and what a gate lets through."""
    rng = np.random.default_rng(0)
    n_speakers = max(n // SPEAKER, 2)
    true = rng.integers(n_speakers, size=n)
    pseudo = rng.permutation(n_speakers)[true]
    wrong = rng.random(n) < 0.1
    pseudo[wrong] = rng.integers(n_speakers, size=wrong.sum())
    return true, pseudo, rng.random(n) < np.where(wrong, 0.2, 0.9)


def losses(n):
    """Losses with two humps on a log scale, float32."""
    rng = np.random.default_rng(0)
    low = rng.random(n) < 0.8
    logs = rng.normal(np.where(low, -2.0, 1.5), 0.7)
    return np.exp(logs).astype(np.float32)


# The tasks: each prepares its input and gives back what is to be timed.


def manifest_written(n, folder):
    return lambda: write_manifest(n, folder)


def manifest_read(n, folder):
    write_manifest(n, folder)
    return lambda: load_manifest(folder / "manifest.csv", "corpus")


def set_aside(n, folder):
    return lambda: held_out(n, 0.005, 1)


def labels_written(n, folder):
    pseudo = torch.from_numpy(labels(n)[1])
    utterances = Strings(names(n))
    return lambda: write_labels(folder / "labels.csv", utterances, pseudo)


def labels_joined(n, folder):
    write_manifest(n, folder)
    manifest = load_manifest(folder / "manifest.csv", "corpus")
    pseudo = torch.from_numpy(labels(n)[1])
    write_labels(folder / "labels.csv", manifest.ids, pseudo)

    def join():
        found, values = read_labels(folder / "labels.csv")
        joined = np.full(n, -1)
        joined[manifest.rows(found)] = values

    return join


def embeddings_opened(n, folder):
    # Sparse: the vectors are not read.
    np.lib.format.open_memmap(
        folder / "vectors.npy", "w+", np.float32, (n, 192)
    )
    with open(folder / "utterances.txt", "wb") as out:
        Strings(names(n)).save(out)
    return lambda: Embeddings.load(folder)


def target_share_gate(n, folder):
    seen = losses(n)
    return lambda: TargetShareGate(0.8).end_epoch(seen)


def dynamic_gate(n, folder):
    seen = losses(n)
    return lambda: DynamicGate().end_epoch(seen)


def mixture(n, folder):
    logs = np.log(losses(n))
    return lambda: fit_mixture(logs)


def nmi(n, folder):
    true, pseudo, _ = labels(n)
    return lambda: normalized_mutual_info_score(true, pseudo)


def ami(n, folder):
    true, pseudo, _ = labels(n)
    return lambda: agreement.ami(true, pseudo)


def hungarian(n, folder):
    true, pseudo, _ = labels(n)
    return lambda: pseudo_labels.hungarian_mapping(true, pseudo)


def reliability(n, folder):
    true, pseudo, _ = labels(n)
    return lambda: pseudo_labels.reliable(true, pseudo)


def clustering_report(n, folder):
    true, pseudo, selected = labels(n)
    return lambda: pseudo_labels.clustering_report(true, pseudo, selected)


def run_table(n, folder):
    run = Run(folder, 2, {})
    figures = dict.fromkeys(metrics_log.COLUMNS, 1.0)
    for iteration in range(1, 6):
        for phase in ("clusters", "classifier", "gated"):
            for epoch in range(10):
                run.log(
                    stage=2,
                    iteration=iteration,
                    phase=phase,
                    epoch=epoch,
                    **figures,
                )

    def summarise():
        rows = metrics_log.summarise(metrics_log.read_metrics(folder))
        metrics_log.table([rows])

    return summarise


TASKS = {
    "manifest, written": manifest_written,
    "manifest, read": manifest_read,
    "utterances set aside": set_aside,
    "labels, written": labels_written,
    "labels, read and joined by ID": labels_joined,
    "embeddings, opened": embeddings_opened,
    "TargetShareGate.end_epoch": target_share_gate,
    "DynamicGate.end_epoch": dynamic_gate,
    "fit_mixture": mixture,
    "nmi": nmi,
    "ami": ami,
    "hungarian_mapping": hungarian,
    "reliable": reliability,
    "clustering_report": clustering_report,
    "report's table (50 epochs a phase)": run_table,
}


def timed(name, n, threads):
    """Seconds and peak memory of a task; meant for a process of its own."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        task = TASKS[name](n, pathlib.Path(folder))
        gc.collect()
        reset_peaks()
        started = time.perf_counter()
        task()
        return time.perf_counter() - started, peaks()["host_mib"]


def main(options):
    """Runs all tasks at all sizes and reports their growth."""
    sizes = [10**power for power in range(4, options.max + 1)]
    seconds = {(name, n): [] for name in TASKS for n in sizes}
    memory = {}
    # A fork has the libraries at once; it ends with its one task.
    fork = multiprocessing.get_context("fork")
    with fork.Pool(1, maxtasksperchild=1) as pool:
        for _ in range(options.repeats):
            for name, n in seconds:
                spent, peak = pool.apply(timed, (name, n, options.threads))
                seconds[name, n].append(spent)
                memory[name, n] = peak
                print(f"{name}, {n:,}: {spent:.3f} s, {peak:.0f} MiB")
    rows = []
    for name in TASKS:
        row = {"what": name}
        for n in sizes:
            found = seconds[name, n]
            row[f"s at {n:.0e}"] = statistics.median(found)
            row[f"spread at {n:.0e}"] = f"{min(found):.3g}-{max(found):.3g}"
            row[f"MiB at {n:.0e}"] = memory[name, n]
        if len(sizes) > 1:
            times = [statistics.median(seconds[name, n]) for n in sizes[-2:]]
            growth = [n * math.log(n) for n in sizes[-2:]]
            row["exponent"] = math.log10(times[1] / times[0])
            row["N log N"] = math.log10(growth[1] / growth[0])
        rows.append(row)
    report(rows, "Growth with the number of utterances", options.json)


if __name__ == "__main__":
    parser = arguments(__doc__, device=False)
    parser.add_argument("--max", type=int, default=6, help="power of ten")
    parser.set_defaults(repeats=3)
    main(parser.parse_args())
