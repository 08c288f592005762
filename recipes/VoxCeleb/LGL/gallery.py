#!/usr/bin/env python3
"""Compares Stage I's methods at equal processor time.

> python gallery.py hparams/small_stage1.yaml --minutes=6 --seeds=1,2,3 \
    --data_folder=/path/to/an4_sessions --output_folder=results/gallery

Each method has the same encoder, batches and augmentation, and as many steps
as fit into the time on one thread, by the measured time of a few steps. Figures
at six points of the training are written to gallery.md, and as curves to
gallery.png. Label-free figures, which could choose a method, stand beside the
true error rate. Any option of the recipe may follow, except those that the
gallery sets itself. Finished runs are not repeated.
"""

import dataclasses
import json
import pathlib
import sys
import tempfile

import numpy as np
from experiments import count, make_parser, run_all, run_command
from scipy.stats import spearmanr
from study import spread, trials_of

from lgl_plugin.report.figures import courses, save
from lgl_plugin.runs.arguments import key_of, paired, run_options
from lgl_plugin.runs.metrics_log import read_metrics
from lgl_plugin.runs.settings import settings_of
from lgl_plugin.utils.device import peak_bytes
from lgl_plugin.utils.errors import explained_errors
from lgl_plugin.utils.files import atomic_write, write_json
from lgl_plugin.utils.tables import markdown_table

ASKED = "gallery_options.json"
HERE = pathlib.Path(__file__).resolve().parent
# Options that the gallery sets for each run.
OWN = {
    *("method", "seed", "ssps_epochs"),
    *("number_of_epochs", "steps_per_epoch", "selection_study"),
    "selection",  # the figures are those of the last epoch
}
# Two numbers of steps; the difference of their processor times gives a step's.
# A single run would include the start, whose time varies by seconds, more than
# a dozen steps of the small preset take.
PILOT = (10, 70)
EPOCHS = 6  # a method is measured at the end of each


@dataclasses.dataclass(frozen=True)
class Entry:
    """A method with its arguments in the gallery."""

    title: str
    made_by: str
    arguments: str = ""

    @property
    def name(self):
        """Name of the run's folder."""
        return self.title.lower().replace(" ", "-").replace("+", "and")

    @property
    def option(self):
        """Override of the yaml that selects the method."""
        path = f"!name:lgl_plugin.methods.{self.made_by}"
        return f"--method={path} {{{self.arguments}}}"


METHODS = (
    Entry("SimCLR + AAT", "simclr.SimCLR"),
    Entry("SimCLR", "simclr.SimCLR", "adversarial_weight: 0.0"),
    Entry("MoCo", "moco.MoCo"),
    Entry("VICReg", "vicreg.VICReg"),
    Entry("Barlow Twins", "vicreg.BarlowTwins"),
    Entry("SimSiam", "simsiam.SimSiam"),
    Entry("DINO", "dino.DINO"),
    Entry("RDINO", "dino.DINO", "regularisation: 0.2"),
    Entry("SDPN", "sdpn.SDPN"),
)
# For each key of a record: a title, and True if a higher value is better.
LABEL_FREE = {
    "pseudo_eer": ("pseudo-trials' EER", False),
    "contrastive_accuracy": ("contrastive accuracy", True),
    "effective_dimensions": ("effective dimensions", True),
    "alignment": ("alignment", False),
    "uniformity": ("uniformity", False),
    "silhouette": ("silhouette", True),
}


def main():
    """Trains all methods and writes the tables."""
    parser = make_parser(__doc__, seeds="1")
    parser.add_argument("yaml", help="Stage I's")
    parser.add_argument("--minutes", type=float, default=6.0)
    names = [entry.name for entry in METHODS]
    parser.add_argument(
        "--methods", default=",".join(names), help="of " + ", ".join(names)
    )
    parser.add_argument("--jobs", type=count, default=1, help="runs at a time")
    parser.add_argument("--output_folder", default="results/gallery")
    options, overrides = parser.parse_known_args()
    overrides = paired(overrides, run_options())
    chosen = options.methods.split(",")
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"--methods: {unknown} is none of {', '.join(names)}")
    methods = [entry for entry in METHODS if entry.name in chosen]
    if not 0 < options.minutes < np.inf:
        parser.error(f"--minutes={options.minutes}: it must be above 0")
    if own := sorted({key_of(word) for word in overrides} & OWN):
        parser.error(f"--{own[0]}: the gallery sets that itself")
    # A mistyped option or a missing list shows here, not after the first runs.
    try:
        settings, _ = settings_of([options.yaml, *overrides])
        trials_of(dict(settings), "gallery")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    folder = pathlib.Path(options.output_folder).absolute()
    asked = {"yaml": options.yaml, "minutes": options.minutes}
    asked["options"] = sorted(overrides)
    asked_path = folder / ASKED
    if asked_path.exists() and not same(
        json.loads(asked_path.read_text("utf-8")), asked
    ):
        if any(folder.glob("seed*/*/gallery.json")):
            parser.error(
                f"{folder} holds a gallery of another yaml, other --minutes or "
                f"options (see {ASKED} there): take another --output_folder"
            )
        # No run is done, so the options of a failed command may be corrected.
        # The timings of its steps were with the old options.
        for length in folder.glob("seed*/*/length.json"):
            length.unlink()
    write_json(asked_path, asked)
    command = [sys.executable, str(HERE / "train_lgl.py"), options.yaml]
    command += overrides
    calls = [
        (entry, command, folder, seed, options.minutes)
        for seed in options.seeds
        for entry in methods
    ]
    with explained_errors(1, "--debug" in overrides):
        run_all(options.jobs, train, calls)
    runs = read_runs(folder, methods, options.seeds)
    write_results(folder, runs, settings.batch_size, options.minutes)


def same(before, asked):
    """Returns True if two commands asked the same, however typed."""
    options = [
        sorted(" ".join(command["options"]).replace("=", " ").split())
        for command in (before, asked)
    ]
    return {**before, "options": options[0]} == {**asked, "options": options[1]}


def train(entry, command, folder, seed, minutes):
    """Trains a method for `minutes` of processor time."""
    run = folder / f"seed{seed}" / entry.name
    if (run / "gallery.json").exists():
        return
    command = [*command, entry.option, f"--seed={seed}", "--ssps_epochs=0"]
    length = run / "length.json"
    # An interrupted run must continue with its first number of steps.
    if not length.exists():
        step = seconds_per_step(command)
        steps = max(1, round(60 * minutes / step / EPOCHS))
        run.mkdir(parents=True, exist_ok=True)
        write_json(length, {"seconds_per_step": step, "steps": EPOCHS * steps})
    facts = json.loads(length.read_text())
    command += [
        f"--output_folder={run}",
        f"--number_of_epochs={EPOCHS}",
        f"--steps_per_epoch={facts['steps'] // EPOCHS}",
        "--selection_study=True",
    ]
    usage = run_command(command, run / "printed.txt", threads=1)
    facts["most_bytes"] = peak_bytes(usage)
    write_json(run / "gallery.json", facts)


def seconds_per_step(command):
    """Returns the processor time of a training step in seconds."""
    command = [w for w in command if not w.startswith("--verification_file=")]
    times = []
    for steps in PILOT:
        with tempfile.TemporaryDirectory() as scratch:
            options = [
                f"--output_folder={scratch}",
                "--number_of_epochs=1",
                f"--steps_per_epoch={steps}",
                "--verification_file=null",
            ]
            printed = pathlib.Path(scratch, "printed.txt")
            usage = run_command([*command, *options], printed, threads=1)
        times.append(usage.ru_utime + usage.ru_stime)
    step = (times[1] - times[0]) / (PILOT[1] - PILOT[0])
    if step <= 0:
        raise RuntimeError("steps cannot be timed: the machine is too busy")
    return step


def read_runs(folder, methods, seeds):
    """Returns facts, epochs' records and the last record, by seed and entry."""
    runs = {}
    for seed in seeds:
        for entry in methods:
            run = folder / f"seed{seed}" / entry.name
            records = [r for r in read_metrics(run) if r["stage"] == 1]
            facts = json.loads((run / "gallery.json").read_text())
            epochs = [r for r in records if "epoch" in r]
            runs[seed, entry] = facts, epochs, records[-1]
    return runs


def write_results(folder, runs, batch_size, minutes):
    """Writes and prints the tables, and draws the methods' curves."""
    text = "\n\n".join(tables(runs, batch_size))
    with atomic_write(folder / "gallery.md") as out:
        out.write(text + "\n")
    eers = {}
    for (_, entry), (_, epochs, _) in runs.items():
        eers.setdefault(entry.title, []).append([one["eer"] for one in epochs])
    means = {title: np.mean(values, 0) for title, values in eers.items()}
    save(courses(means, minutes), folder, "gallery")
    print(f"\n{text}\n")


def tables(runs, batch_size):
    """Yields tables: the methods' figures, their EERs by epoch, criteria."""
    seeds = list(dict.fromkeys(seed for seed, _ in runs))
    methods = list(dict.fromkeys(entry for _, entry in runs))
    rows, by_epoch, agreement = [], [], {key: [] for key in LABEL_FREE}
    for entry in methods:
        facts, epochs, last = zip(*(runs[seed, entry] for seed in seeds))
        eers = [
            spread([one[n]["eer"] for one in epochs]) for n in range(EPOCHS)
        ]
        by_epoch.append([entry.title, *eers])
        rows.append(
            [
                entry.title,
                spread([one["steps"] for one in facts], digits=0),
                spread([batch_size / one["seconds_per_step"] for one in facts]),
                spread([one["most_bytes"] for one in facts], 2**-30),
                spread([one["eer"] for one in last]),
                spread([one["eer_backend"] for one in last]),
                *(
                    spread([one[-1][key] for one in epochs], digits=2)
                    for key in LABEL_FREE
                ),
            ]
        )
    titles = [title for title, _ in LABEL_FREE.values()]
    header = ["method", "steps", "utterances/s", "GiB"]
    header += ["EER %", "EER %, whitened"]
    yield markdown_table([*header, *titles], rows)
    header = [f"{n} of {EPOCHS}" for n in range(1, EPOCHS + 1)]
    yield markdown_table(["EER % at", *header], by_epoch)
    if len(methods) < 3:
        return  # too few for a rank correlation
    for seed in seeds:
        eers = [runs[seed, entry][2]["eer"] for entry in methods]
        for key, (_, higher_is_better) in LABEL_FREE.items():
            values = [runs[seed, entry][1][-1][key] for entry in methods]
            values = np.array(values, float)
            rank = spearmanr(-values if higher_is_better else values, eers)
            agreement[key].append(rank.statistic)
    yield markdown_table(
        ["criterion", "rank correlation with EER"],
        [
            [LABEL_FREE[key][0], spread(agreement[key], 1, 2)]
            for key in LABEL_FREE
        ],
    )


if __name__ == "__main__":
    main()
