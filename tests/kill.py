#!/usr/bin/env python3
"""Kills a small run of both stages at random moments and goes on with it.

> python tests/kill.py --kills 24 --seed 1 --output kills.json

Each kill is a `kill -9` of all its processes, at a random line of what the
run prints and a random time after it; the same command follows. In the end
pseudo-labels, weights, metrics and what the gate selected must be, bit for
bit, those of the run that was never killed.
"""

import argparse
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch

from lgl_plugin.dataio.synthetic import make_corpus
from lgl_plugin.runs.metrics_log import read_metrics

SCRIPT = ["train_lgl.py"]
RECIPE = pathlib.Path(__file__).parents[1] / "recipes" / "VoxCeleb" / "LGL"
TINY = (
    "--batch_size=8",
    "--steps_per_epoch=13",
    "--dataloader_options={num_workers: 1}",
    "--crop_seconds=0.5",
    "--new_encoder={network: {channels: [16, 16, 16, 16, 48], "
    "attention_channels: 16}}",
    "--device=cpu",
    "--noprogressbar",
    "--ckpt_interval_minutes=0",
    "--ckpt_interval_steps=2",
)
STAGES = (
    ("small_stage1.yaml", "--number_of_epochs=2", "--ssps_epochs=0"),
    (
        "small_stage2.yaml",
        "--n_iterations=2",
        "--n_clusters=5",
        "--classifier_epochs=1",
        "--gated_epochs=2",
    ),
)
# What tells of the clock and not of the run.
TIMES = ("seconds", "utterances_per_second")
LONGEST_WAIT = 0.7  # seconds after a line; an epoch here takes about one


def tiny_corpus(folder):
    """Five speakers to train on, four to test on."""
    make_corpus(
        folder,
        speakers=5,
        test_speakers=4,
        sessions=2,
        utterances=3,
        seconds=(1.0, 2.0),
        seed=3,
        workers=1,
    )


def command(corpus, output, stage):
    """What a user types for a stage."""
    yaml, *options = STAGES[stage]
    return [
        *(sys.executable, *SCRIPT, f"hparams/{yaml}"),
        *TINY,
        *options,
        f"--data_folder={corpus}",
        f"--train_folder={corpus}/wav",
        f"--trial_folder={corpus}/wav",
        f"--output_folder={output}",
    ]


def start(words):
    """Starts a run; its lines come as it prints them."""
    return subprocess.Popen(
        words,
        cwd=RECIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
        errors="replace",
    )


def finish(words):
    """Runs to the end; returns the lines printed."""
    run = start(words)
    lines = run.stdout.read().splitlines()
    if run.wait():
        raise RuntimeError(
            "\n".join([f"status {run.returncode}", *lines[-30:]])
        )
    return lines


def stop(words, line, wait, number=signal.SIGKILL):
    """Runs until `wait` seconds after a line, then sends a signal.

    Returns
    -------
    (str, int, list of str)
        The line that was the last to be seen before it, the exit status, and
        what was printed after the signal.
    """
    run = start(words)
    last = next(itertools.islice(run.stdout, line - 1, None), "")
    time.sleep(wait)
    try:
        os.killpg(run.pid, number)
    except ProcessLookupError:
        last = "(it had ended)"
    rest = run.stdout.read().splitlines()
    return last.strip(), run.wait(), rest


def outcome(folder):
    """All that must not differ, by name."""
    found = {
        "metrics": [
            {key: of for key, of in record.items() if key not in TIMES}
            for record in read_metrics(folder)
        ]
    }
    for path in sorted(folder.glob("iter*/labels/labels.csv")):
        found[str(path.relative_to(folder))] = path.read_text()
    steps = [folder / "stage1", *sorted(folder.glob("iter*/*"))]
    for path in [file for step in steps for file in sorted(step.glob("*.*"))]:
        name = str(path.relative_to(folder))
        if path.suffix == ".ckpt":
            state = torch.load(path, map_location="cpu", weights_only=True)
            found[name] = {key: of.numpy() for key, of in state.items()}
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                found[name] = dict(arrays)
        elif path.suffix == ".npy":
            found[name] = {"array": np.load(path)}
    return found


def differences(whole, other):
    """Names of what differs between two outcomes."""
    names = []
    for name in sorted({*whole, *other}):
        one, two = whole.get(name), other.get(name)
        if isinstance(one, dict) and isinstance(two, dict):
            same = one.keys() == two.keys() and all(
                np.array_equal(
                    value, two[key], equal_nan=value.dtype.kind == "f"
                )
                for key, value in one.items()
            )
        else:
            same = one == two
        if not same:
            names.append(name)
    return names


def make_reference(folder):
    """A corpus and a run that nobody kills; what each stage printed."""
    tiny_corpus(folder / "corpus")
    printed = []
    for stage in (0, 1):
        words = command(folder / "corpus", folder / "whole", stage)
        printed.append(finish(words))
        if stage == 0:  # kills of Stage II begin with it
            shutil.copytree(folder / "whole", folder / "stage1")
    return printed


def survive(folder, output, stage, line, wait):
    """Kills a stage once, goes on, and compares with the whole run."""
    if stage == 1:
        shutil.copytree(folder / "stage1", output)
    words = command(folder / "corpus", output, stage)
    last, _, _ = stop(words, line, wait)
    finish(words)
    if stage == 0:
        finish(command(folder / "corpus", output, 1))
    return last, differences(outcome(folder / "whole"), outcome(output))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", help="json for the outcome of each kill")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    made = []
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        printed = make_reference(folder)
        lines = [(s, n) for s in (0, 1) for n in range(1, len(printed[s]) + 1)]
        for n in range(options.kills):
            stage, line = rng.choice(lines)
            wait = rng.uniform(0, LONGEST_WAIT)
            output = folder / f"killed{n}"
            last, differ = survive(folder, output, stage, line, wait)
            shutil.rmtree(output)
            made.append({"stage": stage + 1, "after": last, "differ": differ})
            print(
                f"{n + 1:3}  Stage {'I' * (stage + 1):2}  "
                f"{'differs: ' + ', '.join(differ) if differ else 'as whole'}"
                f"  {wait:.2f} s after: {last[-60:]}",
                flush=True,
            )
    survived = sum(not kill["differ"] for kill in made)
    print(f"{survived} of {len(made)} kills survived")
    if options.output:
        pathlib.Path(options.output).write_text(json.dumps(made, indent=1))
    return survived < len(made)


if __name__ == "__main__":
    sys.exit(main())
