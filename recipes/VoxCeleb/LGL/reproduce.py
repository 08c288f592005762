#!/usr/bin/env python3
"""Python steps of reproduce.sh, which documents them.

> python reproduce.py hours --archives=DOWNLOADS --data=DATA --exp=RESULTS

unpack   archives, split ones too, to audio; existing files are kept
convert  m4a to wav
check    makes the manifest and times steps of every yaml
hours    prints the estimated hours of each stage
batch    prints the utterances of a step for each process
settings refuses options that the trainings would refuse hours later
last     prints the last step of Stage II
results  writes RESULTS.md and a table in each model card
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile

from archives import LISTS, convert, unpack

HERE = pathlib.Path(__file__).parent
# Number of processes to which the batch_size of these yamls applies.
PROCESSES = {"dino": 2, "rdino": 4, "sdpn": 4}
STAGES = (
    *("unpack", "convert", "check", "Stage I", "Stage II"),
    *("Stage I by other methods", "scores", "the paper's tables", "results"),
)
# EER in % on O, E and H as published, or from the best to the worst
# reproduction, and their source.
PUBLISHED = {
    "stage1": ("7.36", "", "", "Tao et al., release"),
    "stage2": ("1.66", "2.18", "3.76", "Tao et al. 2022"),
    "moco": ("8.71", "9.29", "14.76", "wespeaker"),
    "vicreg": ("7.42", "", "", "sslsv, 1,024 channels"),
    "dino": ("3.02", "", "", "wespeaker"),
    "rdino": ("3.16", "", "", "3D-Speaker"),
    "sdpn": ("1.80 to 1.88", "1.99", "3.62", "3D-Speaker"),
}
# Assumed, because nothing is timed before stage 3.
BYTES_A_SECOND, M4A_BYTES, SECONDS_A_M4A = 50e6, 66e3, 0.1
KINDS = ("cosine", "AS-norm")
COHORT = 20_000  # utterances that `lgl verify` draws
# Trainings of the paper's tables, in Stage II's costs: without the gate 0.9,
# five numbers of clusters 1.5, six thresholds 0.6.
TABLES = 3.0


def batch(options, rest):
    """Prints each yaml's batch size per process, for the published batch."""
    for name in rest:
        print(batch_of(options, name))


def settings(options, rest):
    """Refuses options that the yamls of the trainings do not accept."""
    from lgl_plugin.runs.settings import plain_settings_of

    for word in rest:
        if not word.startswith("--"):  # paper.py would refuse it
            raise ValueError(f"{word}: give settings as --key=value")
    for name in ("stage1", "stage2", *options.methods):
        # reproduce.sh adds these options, and options must not be given twice.
        own = [f"--batch_size={batch_of(options, name)}", "--seed=1"]
        own.append(f"--output_folder={options.exp}")
        yaml = str(options.hparams / f"{name}.yaml")
        plain_settings_of([yaml, *own, *rest])


def batch_of(options, name):
    """Returns a yaml's batch size per process.

    Raises ValueError if --nproc does not divide the whole batch.
    """
    from lgl_plugin.runs.settings import read_preset

    size = read_preset(options.hparams / f"{name}.yaml")["batch_size"]
    size *= PROCESSES.get(name, 1)
    if size % options.nproc:
        raise ValueError(
            f"--nproc={options.nproc}: a batch of {size} ({name}.yaml) cannot "
            "be shared evenly"
        )
    return size // options.nproc


def last(options, rest):
    """Prints the last step of Stage II."""
    from lgl_plugin.runs.settings import read_preset

    settings = read_preset(options.hparams / "stage2.yaml")
    print(f"iter{settings['n_iterations']}/gated")


def check(options, rest):
    """Lists the audio for all trainings; times each as `lgl check` does."""
    import logging

    from lgl_plugin.cli.cost import cost_of_stage1, cost_of_stage2, open_session
    from lgl_plugin.dataio.prepare import prepare_manifest
    from lgl_plugin.runs.provenance import device_name
    from lgl_plugin.utils.files import write_json

    facts = prepare_manifest(
        options.data / "vox2" / "wav",
        options.exp / "manifest.csv",
        data_root=options.data / "vox2",
        trials=options.data / "lists" / "veri_test2.txt",
        trial_folder=options.data / "vox1" / "wav",
    )
    print(f"VoxCeleb2  {facts['kept']:,} files, {facts['hours']:.2f} hours")
    costs = {"kept": facts["kept"], "hours": facts["hours"], "stages": {}}
    costs["processes"] = options.nproc
    logging.disable(logging.INFO)
    options_of_user = [o for o in rest if not o.startswith("--manifest=")]
    for name in ("stage1", "stage2", *options.methods):
        yaml = options.hparams / f"{name}.yaml"
        print(f"{name}.yaml")
        with tempfile.TemporaryDirectory(dir=options.exp) as scratch:
            scratch = pathlib.Path(scratch)
            (scratch / "manifest.csv").symlink_to(options.exp / "manifest.csv")
            size = f"--batch_size={batch_of(options, name)}"
            folder = f"--output_folder={scratch / 'run'}"
            words = [*options_of_user, size, folder]
            session = open_session(scratch, facts["kept"], yaml, words, {})
            cost = cost_of_stage2 if name == "stage2" else cost_of_stage1
            costs["stages"][name] = cost(session, facts)
            if name == "stage2":
                rounds = session.settings.n_iterations
                embedding_hours = costs["stages"][name]["embedding"]
                costs["speech_per_hour"] = (
                    rounds * facts["hours"] / embedding_hours
                )
    costs["device"] = device_name(session.device)
    write_json(options.exp / "costs.json", costs)


def hours(options, rest):
    """Prints the estimated hours of a stage, or of all stages."""
    for number, title in enumerate(STAGES, 1):
        if options.of not in (None, number):
            continue
        time = estimate(options, number)
        words = "not known before stage 3"
        if time is not None:
            words = f"about {time:.1f} h" if time >= 0.05 else "minutes"
            words += " (assumed)" if number < 3 else ""
        done = (options.exp / "done" / str(number)).exists()
        print(f"stage {number}, {title}: {'done' if done else words}")


def estimate(options, number):
    """Returns the estimated hours of a stage; None if still unknown."""
    archives = pathlib.Path(options.archives)
    if number == 1:
        files = [path for path in archives.glob("*") if path.is_file()]
        return sum(p.stat().st_size for p in files) / BYTES_A_SECOND / 3600
    if number == 2:
        files = archives.glob("vox2_dev_aac*")
        n_files = sum(p.stat().st_size for p in files) / M4A_BYTES
        return n_files * SECONDS_A_M4A / options.jobs / 3600
    if number in (3, 9):
        return 0.0
    path = options.exp / "costs.json"
    if not path.exists():
        return None
    costs = json.loads(path.read_text(encoding="utf-8"))
    processes = costs["processes"]
    by_name = {
        name: sum(parts.values()) for name, parts in costs["stages"].items()
    }
    first, second = by_name.pop("stage1"), by_name.pop("stage2")
    if number < 7:
        return (first, second, sum(by_name.values()))[number - 4] / processes
    if number == 8:
        n_seeds = len(options.seeds.split(","))
        time = n_seeds * TABLES * second + (n_seeds - 1) * (first + second)
        return time / processes
    scored = set()
    for name in LISTS:
        lines = (options.data / "lists" / f"{name}.txt").read_text().split()
        scored.update(word for word in lines if "/" in word)
    share = (len(scored) + min(COHORT, costs["kept"])) / costs["kept"]
    share *= 2 * (2 + len(by_name))  # the last epoch's encoder, and the mean
    return share * costs["hours"] / costs["speech_per_hour"]


def results(options, rest):
    """Writes the tables of all scores."""
    from lgl_plugin.utils.files import atomic_write
    from lgl_plugin.utils.tables import markdown_table

    costs = json.loads((options.exp / "costs.json").read_text("utf-8"))
    cells = [(name, kind) for name in LISTS.values() for kind in KINDS]
    header = ["System", "hyperparams file", *map(" ".join, cells)]
    header += ["published O, E, H", "Model", "GPUs"]
    rows = []
    for name in ("stage1", "stage2", *options.methods):
        *figures, source = PUBLISHED.get(name, ("", "", "", ""))
        published = ", ".join(filter(None, figures))
        if published:
            published += f" ({source})"
        models = [name, f"{name}-average"] if options.average > 1 else [name]
        for model in models:  # another may be left from other settings
            card = options.exp / "models" / model / "README.md"
            if not card.exists():
                continue
            found = rates(options.exp / "scores" / name, model)
            add_to_card(card, found)
            rows.append(
                [
                    model.replace("-", ", "),
                    f"{name}.yaml",
                    *(f"{found[of][kind]['eer']:.2f}" for of, kind in cells),
                    published,
                    f"[{model}](models/{model})",
                    f"{costs['processes']} x {costs['device']}",
                ]
            )
    text = (
        "# VoxCeleb1, without labels\n\nEER in %. `average` is the mean of the "
        "weights of the last epochs. minDCF and intervals are in `scores`, "
        "curves in each run's `report/index.html`.\n\n"
        + markdown_table(header, rows)
    )
    for path in sorted((options.exp / "paper").glob("*.md")):
        text += f"\n\n## {path.stem}\n\n{path.read_text('utf-8').strip()}"
    with atomic_write(options.exp / "RESULTS.md") as out:
        out.write(text + "\n")
    print(text)


def rates(folder, model):
    """Reads an encoder's error rates, by list and kind of scores."""
    rates_by_list = {}
    for name, title in LISTS.items():
        text = (folder / name / "metrics.json").read_text("utf-8")
        scores = json.loads(text)["scores"]
        rates_by_list[title] = {
            kind: scores.get(f"{model}, {kind}") or scores[kind]
            for kind in KINDS
        }
    return rates_by_list


def add_to_card(card, found):
    """Writes error rates into a model card, in place of earlier ones."""
    from lgl_plugin.utils.files import atomic_write
    from lgl_plugin.utils.tables import markdown_table

    title = "## Results on VoxCeleb1"
    before = card.read_text("utf-8").partition(title)[0].rstrip()
    rows = [
        [
            f"{name}, {kind}",
            f"{one['eer']:.2f}",
            f"{one['min_dcf_001']:.3f}",
        ]
        for name, kinds in found.items()
        for kind, one in kinds.items()
    ]
    table = markdown_table(["trials", "EER %", "minDCF 0.01"], rows)
    with atomic_write(card) as out:
        out.write(f"{before}\n\n{title}\n\n{table}\n")


def main():
    """Runs the function that the first word names."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --seed is the recipe's, not short for --seeds
    )
    works = (unpack, convert, check, hours, batch, settings, last, results)
    works = {work.__name__: work for work in works}
    parser.add_argument("work", choices=works)
    path = pathlib.Path
    parser.add_argument("--archives", required=True)
    parser.add_argument("--data", type=path, required=True)
    parser.add_argument("--exp", type=path, required=True)
    parser.add_argument("--hparams", type=path, default=HERE / "hparams")
    parser.add_argument("--methods", type=str.split, default=[])
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--nproc", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--average", type=int, default=10)
    parser.add_argument("--of", type=int, help="stage of `hours`; none: all")
    options, rest = parser.parse_known_args()
    if rest and works[options.work] not in (batch, settings, check):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        works[options.work](options, rest)
    except (ValueError, OSError) as error:
        sys.exit(f"reproduce.py {options.work}: {error}")


if __name__ == "__main__":
    main()
