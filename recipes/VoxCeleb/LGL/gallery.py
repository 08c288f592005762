#!/usr/bin/env python3
"""Stage I's methods beside each other, at equal processor time.

> python gallery.py hparams/small_stage1.yaml --minutes=6 --seeds=1,2,3 \
    --data_folder=/path/to/an4_sessions --output_folder=results/gallery

Each method has the same encoder, batches and augmentation, and as many steps
as fit into the time on one thread, which a few steps of it tell. Its figures
at six points of the training go to gallery.md, and as curves to gallery.png,
with the label-free ones that could choose a method beside the true error rate.
Any option of the recipe may
follow but those that the gallery sets itself. A run that is done is not done
again.
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
    "selection",  # figures are those of the last epoch
}
# Steps whose difference is timed. Starts differ by seconds of processor time,
# more than a dozen steps of the small preset take.
PILOT = (10, 70)
EPOCHS = 6  # at whose ends a method is looked at


@dataclasses.dataclass(frozen=True)
class Entry:
    """A method with the arguments that it is shown with."""

    title: str
    made_by: str
    arguments: str = ""

    @property
    def name(self):
        """The folder's name."""
        return self.title.lower().replace(" ", "-").replace("+", "and")

    @property
    def option(self):
        """The override of the yaml."""
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
# By the key of a record: a title, and whether a higher value is better.
LABEL_FREE = {
    "pseudo_eer": ("pseudo-trials' EER", False),
    "contrastive_accuracy": ("contrastive accuracy", True),
    "effective_dimensions": ("effective dimensions", True),
    "alignment": ("alignment", False),
    "uniformity": ("uniformity", False),
    "silhouette": ("silhouette", True),
}


def main():
    """Trains all methods and writes down how they did."""
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
    if own := sorted({key_of(word) for word in overrides} & OWN):
        parser.error(f"--{own[0]}: the gallery sets that itself")
    # A mistyped option or a missing list shows here, and not after the first
    # runs.
    try:
        settings, _ = settings_of([options.yaml, *overrides])
        trials_of(dict(settings), "gallery")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    folder = pathlib.Path(options.output_folder).absolute()
    asked = {"yaml": options.yaml, "minutes": options.minutes}
    asked["options"] = sorted(overrides)
    known = folder / ASKED
    if known.exists() and not same(json.loads(known.read_text("utf-8")), asked):
        if any(folder.glob("seed*/*/gallery.json")):
            parser.error(
                f"{folder} holds a gallery of another yaml, other --minutes or "
                f"options (see {ASKED} there): take another --output_folder"
            )
        # No run is done: a command that failed may be corrected, but its
        # steps were timed with the options of before.
        for length in folder.glob("seed*/*/length.json"):
            length.unlink()
    write_json(known, asked)
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
    """Compares what was asked, however its options were typed."""
    words = [
        sorted(" ".join(one["options"]).replace("=", " ").split())
        for one in (before, asked)
    ]
    return {**before, "options": words[0]} == {**asked, "options": words[1]}


def train(entry, command, folder, seed, minutes):
    """Trains a method for so many minutes of processor time."""
    run = folder / f"seed{seed}" / entry.name
    if (run / "gallery.json").exists():
        return
    command = [*command, entry.option, f"--seed={seed}", "--ssps_epochs=0"]
    length = run / "length.json"
    # An interrupted run goes on with as many steps as it began with.
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
    """Returns facts, records of epochs and the last one by seed and method."""
    found = {}
    for seed in seeds:
        for entry in methods:
            run = folder / f"seed{seed}" / entry.name
            records = [r for r in read_metrics(run) if r["stage"] == 1]
            facts = json.loads((run / "gallery.json").read_text())
            epochs = [r for r in records if "epoch" in r]
            found[seed, entry] = facts, epochs, records[-1]
    return found


def write_results(folder, runs, batch_size, minutes):
    """Writes and prints the tables, and draws the methods' courses."""
    found = "\n\n".join(tables(runs, batch_size))
    with atomic_write(folder / "gallery.md") as out:
        out.write(found + "\n")
    eers = {}
    for (_, entry), (_, epochs, _) in runs.items():
        eers.setdefault(entry.title, []).append([one["eer"] for one in epochs])
    means = {title: np.mean(values, 0) for title, values in eers.items()}
    save(courses(means, minutes), folder, "gallery")
    print(f"\n{found}\n")


def tables(found, batch_size):
    """Yields the figures of the methods, their courses, and the criteria."""
    seeds = list(dict.fromkeys(seed for seed, _ in found))
    methods = list(dict.fromkeys(entry for _, entry in found))
    rows, on_the_way, agreement = [], [], {key: [] for key in LABEL_FREE}
    for entry in methods:
        facts, epochs, last = zip(*(found[seed, entry] for seed in seeds))
        eers = [
            spread([one[n]["eer"] for one in epochs]) for n in range(EPOCHS)
        ]
        on_the_way.append([entry.title, *eers])
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
    yield markdown_table(["EER % at", *header], on_the_way)
    if len(methods) < 3:
        return  # which have no ranks to correlate
    for seed in seeds:
        eers = [found[seed, entry][2]["eer"] for entry in methods]
        for key, (_, higher_is_better) in LABEL_FREE.items():
            values = [found[seed, entry][1][-1][key] for entry in methods]
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
