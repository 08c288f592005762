#!/usr/bin/env python3
"""The cost of checking everything on disk.

> python checksums.py --threads=1
> python checksums.py --utterances=10000 --repeats=2

A run folder of five rounds at VoxCeleb2's size is written: a store of
embeddings and labels each. Timed are the check of all of it at the
start of a command (from the page cache: a disk that reads slower than that
sets the time), the record of a round's embeddings, and a checkpoint.
"""

import pathlib
import tempfile

import numpy as np
import torch
from common import arguments, measure, report
from speechbrain.utils.checkpoints import Checkpointer

from lgl_plugin.dataio.labels import write_labels
from lgl_plugin.dataio.manifest import Strings
from lgl_plugin.inference.store import Embeddings
from lgl_plugin.runs.checkpoints import WholeCheckpointer
from lgl_plugin.runs.run import Run
from lgl_plugin.utils.files import checksum

ROUNDS = 5
PARAMETERS = 6_200_000  # of an ECAPA-TDNN with 512 channels


def make_run(folder, n):
    """A run of five rounds, each with a store and labels."""
    names = Strings(f"id{i % 5994:05}/{i:011}.wav" for i in range(n))
    vectors = np.random.default_rng(0).normal(size=(n, 192)).astype(np.float32)
    labels = torch.arange(n) % 6000

    def round_of(place):
        Embeddings(names, vectors).save(place)
        write_labels(place / "labels.csv", names, labels)

    run = Run(folder, 2, {})
    for number in range(ROUNDS):
        run.step(f"iter{number}", round_of)


def start(folder):
    """Does what a command does first: finds all done, if it is whole."""
    run = Run(folder, 2, {})
    for number in range(ROUNDS):
        run.step(f"iter{number}", lambda place: 1 / 0)


def main():
    """Times it."""
    parser = arguments(__doc__, device=False)
    parser.add_argument("--utterances", type=int, default=1_092_009)
    parser.add_argument("--folder", help="where to write; the system's")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        folder = pathlib.Path(folder)
        make_run(folder / "run", options.utterances)
        model = {"model": torch.nn.Linear(3 * PARAMETERS // 1000, 999)}
        plain = Checkpointer(folder / "plain", model)
        whole = WholeCheckpointer(folder / "whole", model)
        store = folder / "run" / "iter0" / "vectors.npy"
        found = measure(
            {
                "start: all of five rounds": lambda: start(folder / "run"),
                "a store's checksum": lambda: checksum(store),
                "checkpoint, SpeechBrain's": plain.save_and_keep_only,
                "checkpoint, synced, with checksums": whole.save_and_keep_only,
            },
            options.repeats,
        )
        size = sum(f.stat().st_size for f in (folder / "run").rglob("*"))
    rows = [{"what": name, **figures} for name, figures in found.items()]
    title = f"{options.utterances:,} utterances, {size / 1e9:.1f} GB in all"
    report(rows, title, options.json)


if __name__ == "__main__":
    main()
