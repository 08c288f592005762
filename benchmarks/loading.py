"""Crops per second from files and from shards, against bare reads.

> python benchmarks/loading.py
> python benchmarks/loading.py --memory

A corpus of noise, 4-12 s each, is written into a temporary folder as wav and
as flac and packed into shards, and is read from the page cache: what is
measured is the work per crop, not the disk. The floors read as many bytes as
a crop has in the file, from random places: of one open file, or of files that
are opened and closed. `--memory` loads a manifest of `--n_memory` utterances,
whose audio is a few short files, and reads batches with `--memory_workers`
processes; memory is the sum of their proportional set sizes.
"""

import multiprocessing
import os
import pathlib
import random
import tempfile
import time

import numpy as np
import soundfile
from common import RATE, arguments, measure, peaks, report, reset_peaks
from speechbrain.dataio.dataloader import make_dataloader
from speechbrain.dataio.sampler import ReproducibleRandomSampler

from lgl_plugin.dataio.dataset import crop_dataset
from lgl_plugin.dataio.manifest import load_manifest
from lgl_plugin.dataio.shards import write_shards

HEADER = "ID,duration,wav,start,stop,spk_id\n"
# Seconds and number of the crops of an utterance.
CROPS = {"stage I": (1.8, 2), "stage II": (3.0, 1)}


def main():
    parser = arguments(__doc__, device=False)
    parser.add_argument("--n", type=int, default=500, help="utterances")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--n_memory", type=int, default=1_092_009)
    parser.add_argument("--memory_workers", type=int, default=8)
    parser.add_argument("--memory_batches", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        if options.memory:
            rows = memory(folder, options)
        else:
            rows = speed(folder, options)
    report(rows, "loading", options.json)


def speed(folder, options):
    """Rows on crops per second: in one process, then with a DataLoader."""
    manifests = write_corpus(folder, options.n)
    rows = []
    for stage, (crop, n_crops) in CROPS.items():
        order = np.random.default_rng(1).permutation(options.n).tolist()
        datasets = {
            name: crop_dataset(manifest, np.arange(options.n), crop, n_crops)
            for name, manifest in manifests.items()
        }
        variants = {}
        for kind in ("wav", "flac"):
            reads = bare_reads(manifests[f"{kind} files"], crop, n_crops, order)
            variants[f"{kind}: floor, read"] = bare(reads, keep_open=True)
            variants[f"{kind}: floor, open and read"] = bare(reads)
            for source in ("files", "shards"):
                dataset = datasets[f"{kind} {source}"]
                variants[f"{kind}: {source}"] = plain_loop(dataset, order)
        rows += speed_rows(variants, stage, options.n * n_crops, options)
    # The last stage's. Several rounds, as the first and last batches of an
    # epoch keep not all workers busy.
    order = order * 4
    for workers in options.workers:
        variants = {
            f"wav: {source}, {workers} workers": loader_loop(
                datasets[f"wav {source}"], order, workers, options.batch_size
            )
            for source in ("files", "shards")
        }
        rows += speed_rows(variants, stage, len(order) * n_crops, options)
    return rows


def speed_rows(variants, stage, n_crops, options):
    """Times variants; compares each with the floor of its kind, if timed."""
    figures = measure(variants, options.repeats)
    rows = []
    for name, took in figures.items():
        row = {
            "what": f"{stage}, {name}",
            "size": n_crops,
            **took,
            "crops/s": n_crops / took["median"],
        }
        floor = figures.get(f"{name.split(':')[0]}: floor, open and read")
        if floor:
            row["times the floor"] = took["median"] / floor["median"]
        rows.append(row)
    return rows


def write_corpus(folder, n):
    """Manifests of the same audio: wav and flac, in files and in shards."""
    rng = np.random.default_rng(0)
    # Twelve bits of noise: flac takes about what it takes for speech.
    samples = rng.normal(0, 100, 60 * RATE).astype(np.int16)
    seconds = rng.uniform(4, 12, n).round(2)
    manifests = {}
    for kind in ("wav", "flac"):
        lines = [HEADER]
        (folder / kind).mkdir()
        for i in range(n):
            frames = round(seconds[i] * RATE)
            start = rng.integers(len(samples) - frames)
            name = f"{kind}/{i:06d}.{kind}"
            soundfile.write(
                folder / name, samples[start : start + frames], RATE
            )
            lines.append(f"{name},{seconds[i]},$data_root/{name},0,{frames},\n")
        files = folder / f"{kind}.csv"
        files.write_text("".join(lines))
        shards = write_shards(files, folder, folder / f"{kind}_shards", 64)
        manifests[f"{kind} files"] = load_manifest(files, folder)
        manifests[f"{kind} shards"] = load_manifest(shards, shards.parent)
    return manifests


def bare_reads(manifest, crop, n_crops, order):
    """(path, first byte, number of bytes) of the crops, in an order."""
    rng = random.Random(0)
    reads = []
    for row in order:
        path = manifest.wavs[row]
        size = os.path.getsize(path)
        length = round(size * min(crop / manifest.durations[row], 1 / n_crops))
        places = [rng.randint(0, size - length) for _ in range(n_crops)]
        reads.append((path, places, length))
    return reads


def bare(reads, keep_open=False):
    """A call that reads bytes; an utterance's file is opened once."""
    handles = {}
    if keep_open:
        # All from one file as large as the largest of them.
        path = max((path for path, _, _ in reads), key=os.path.getsize)
        handle = os.open(path, os.O_RDONLY)
        handles = {path: handle for path, _, _ in reads}

    def call():
        for path, places, length in reads:
            handle = handles.get(path) or os.open(path, os.O_RDONLY)
            for place in places:
                os.pread(handle, length, place)
            if not handles:
                os.close(handle)

    return call


def plain_loop(dataset, order):
    """A call that reads items one after another."""

    def call():
        for index in order:
            dataset[index]

    return call


def loader_loop(dataset, order, workers, batch_size):
    """A call that reads batches; workers stay, so that none is timed start."""
    loader = make_dataloader(
        dataset,
        sampler=order,
        batch_size=batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
    )

    def call():
        for _ in loader:
            pass

    return call


def memory(folder, options):
    """Rows on memory in MiB with a large manifest."""
    n = options.n_memory
    path = write_large_manifest(folder, n)
    rows = [{"what": "before", "host_mib": peaks()["host_mib"]}]
    reset_peaks()
    started = time.perf_counter()
    manifest = load_manifest(path, folder)
    rows.append(
        {
            "what": "loading the manifest",
            "size": n,
            "median": time.perf_counter() - started,
            **peaks(),
        }
    )
    labels = np.arange(n) % 6000
    dataset = crop_dataset(manifest, np.arange(n), 3.0, labels=labels)
    loader = make_dataloader(
        dataset,
        sampler=ReproducibleRandomSampler(dataset),
        batch_size=options.batch_size,
        num_workers=options.memory_workers,
    )
    started = time.perf_counter()
    sizes = []
    for batch, _ in zip(range(options.memory_batches), loader):
        if batch % 10 == 0:
            children = multiprocessing.active_children()
            own, *others = [
                proportional_size(pid)
                for pid in ("self", *(child.pid for child in children))
            ]
            sizes.append((own + sum(others), own, len(others)))
    took = time.perf_counter() - started
    together, own, n_workers = max(sizes)
    rows.append(
        {
            "what": f"reading, with {n_workers} workers",
            "size": n,
            "median": took,
            "host_mib": together,
            "of it the parent": own,
            "crops/s": options.memory_batches * options.batch_size / took,
        }
    )
    return rows


def proportional_size(pid):
    """Memory of a process in MiB; what several share counts once in all."""
    text = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(text.split("\nPss:")[1].split()[0]) / 1024


def write_large_manifest(folder, n):
    """Writes a manifest of n utterances in a few files."""
    frames = 4 * RATE
    for i in range(8):
        samples = np.random.default_rng(i).normal(0, 100, frames)
        soundfile.write(folder / f"{i}.wav", samples.astype(np.int16), RATE)
    with open(folder / "large.csv", "w", encoding="utf-8") as out:
        out.write(HEADER)
        for i in range(n):
            name = f"id{i % 5994:05d}/{i // 8:011d}/{i % 8:05d}.wav"
            out.write(f"{name},4.0,$data_root/{i % 8}.wav,0,{frames},\n")
    return folder / "large.csv"


if __name__ == "__main__":
    main()
