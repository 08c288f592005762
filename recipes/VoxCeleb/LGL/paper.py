#!/usr/bin/env python3
"""Makes the paper's tables and figures, and further ones, on any corpus.

> python paper.py table2 --data_folder=/path/to/VoxCeleb \
    --verification_file=/path/to/veri_test2.txt --trial_folder=/path/to/wav
> python paper.py table2 gates --small --seeds=1,2,3 --jobs=2 \
    --data_folder=/path/to/an4_sessions --output_folder=results/paper/an4

Other options go to the recipe, which trains the missing runs. Each name writes
`<output_folder>/<name>.md` and prints it; figures are in the same folder. True
labels, if folders name speakers, are used for analysis only.

table1     EER of both stages on several trial lists (--lists)
table2     EER of each iteration, with and without the gate
table3     EER of iteration 1 by number of clusters
table4     EER of iteration 1 by threshold
figure2    loss of utterances with reliable and unreliable labels
figure3    NMI and AMI of each iteration; all against selected
gates      every gate in iteration 1: EER, selection, precision, recall
selection  how well each label-free criterion picks the epoch
steps      gain or loss of each larger step
study      log-mels, both stages, true labels: cosine, back-end, AS-norm
backends   EER and minDCF of each encoder by back-end, without training
clusterings  labels of each encoder by clustering, without training

The last two also take finished runs: --runs RUN …, a run for each seed.
"""

import pathlib
import re

from lgl_plugin.utils.threads import spin_briefly

spin_briefly()  # before torch: OpenMP reads the setting on loading

import numpy as np
from experiments import (
    CLASSIFIED,
    CLUSTERED,
    EMBEDDED,
    KEEP_LABELS,
    NO_GATE,
    WITHOUT,
    Experiment,
    Variant,
    count,
    make_parser,
)
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from study import (
    Embedder,
    after,
    backends,
    clusterings,
    spread,
    study,
    trials_of,
)

from lgl_plugin.dataio.manifest import load_manifest, write_part
from lgl_plugin.dataio.trials import read_trials
from lgl_plugin.report.figures import save, style
from lgl_plugin.runs.state import read_state
from lgl_plugin.training.epoch_selection import CRITERIA, criterion
from lgl_plugin.utils.errors import explained_errors
from lgl_plugin.utils.files import atomic_write
from lgl_plugin.utils.tables import markdown_table

HERE = pathlib.Path(__file__).parent
CORRECT = "--correct_labels=!name:lgl_plugin.nnet.gates.LabelCorrection"
SCHEDULE = "--gate=!new:lgl_plugin.nnet.gates.ScheduleGate"
SHARE = "--gate=!new:lgl_plugin.nnet.gates.TargetShareGate [0.8]"
DYNAMIC = "--gate=!new:lgl_plugin.nnet.gates.DynamicGate"
# Iteration 1 must be the first of several iterations. As the last one it would
# take the wider encoder, which is trained from scratch and is not the one that
# was copied.
FIRST = ("--n_iterations=1", "--new_last_encoder=null")

GATES = {
    "schedule": (SCHEDULE, KEEP_LABELS),
    "share": (SHARE, KEEP_LABELS),
    "dynamic": (DYNAMIC, KEEP_LABELS),
    "DLG-LC": (DYNAMIC, CORRECT),
}


def table1(experiment, options):
    """Stages by trial lists."""
    experiment.train([WITHOUT])
    last = experiment.settings["n_iterations"]
    phases = {
        "Stage I": ("base", experiment.stage1_step),
        "Stage II, without the gate": (WITHOUT.name, f"iter{last}/gated"),
        "Stage II, with the gate": ("base", f"iter{last}/gated"),
    }
    rows = []
    for phase, (name, step) in phases.items():
        encoders = [
            Embedder(experiment.run_folder(seed, name), step, experiment.device)
            for seed in experiment.seeds
        ]
        cells = [
            spread([encoder.eer(trials, folder) for encoder in encoders])
            for trials, folder in options.lists.values()
        ]
        rows.append([phase, *cells])
    return markdown_table(["EER %", *options.lists], rows)


def table2(experiment, options):
    """Iterations, with and without the gate."""
    experiment.train([WITHOUT])
    iterations = range(1, experiment.settings["n_iterations"] + 1)
    without, gated = (
        [after(experiment, name, iteration) for iteration in iterations]
        for name in (WITHOUT.name, "base")
    )
    rows = [
        ["without the gate", *map(spread, without)],
        ["with the gate", *map(spread, gated)],
    ]
    wins = [np.less(*pair).sum() for pair in zip(gated, without)]
    n = len(experiment.seeds)
    rows.append(["seeds that the gate won", *(f"{w} of {n}" for w in wins)])
    return markdown_table(
        ["EER %", *(f"iteration {i}" for i in iterations)], rows
    )


def table3(experiment, options):
    """The number of clusters, in iteration 1."""
    standard = experiment.settings["n_clusters"]
    if standard == "auto":  # each seed has its own estimate
        experiment.train([])
        where = {"iteration": 1, "phase": "clusters"}
        standard = np.mean(experiment.values("n_clusters", **where))
    sizes = [round(part * standard) for part in (0.5, 0.75, 1, 1.25, 1.5)]
    variants = []
    for size in sizes:
        more = (f"--n_clusters={size}", *FIRST)
        variants += [
            Variant(f"k{size}", more, EMBEDDED),
            Variant(f"k{size}-no", (*more, *NO_GATE), CLASSIFIED, f"k{size}"),
        ]
    experiment.train(variants)
    rows = [
        [label, *(spread(after(experiment, f"k{k}{end}")) for k in sizes)]
        for label, end in (("without the gate", "-no"), ("with the gate", ""))
    ]
    return markdown_table(["EER %", *(f"K = {k}" for k in sizes)], rows)


def table4(experiment, options):
    """The threshold, in iteration 1."""
    gates = {
        str(tau): (
            f"--gate=!new:lgl_plugin.nnet.gates.FixedGate [{tau}.0]",
            KEEP_LABELS,
        )
        for tau in (1, 2, 3, 4, 5)
    }
    gates["none"] = NO_GATE
    names = {tau: f"tau-{tau}" for tau in gates}
    experiment.train(
        [
            Variant(names[tau], (*gate, *FIRST), CLASSIFIED)
            for tau, gate in gates.items()
        ]
    )
    rows = [
        ["EER %", *(spread(after(experiment, n)) for n in names.values())],
        ["selected %"]
        + [
            spread(after(experiment, n, 1, "selected_share"), 100, 0)
            for n in names.values()
        ],
    ]
    return markdown_table(["threshold", *names], rows)


def figure2(experiment, options):
    """Ten speakers, ten clusters: how fast which labels are learnt."""
    experiment.train([])
    for seed in experiment.seeds:
        run = experiment.run_folder(seed)
        manifest = experiment.settings["manifest"] or run / "manifest.csv"
        ten_speakers(manifest, run / "ten_speakers.csv")
    toy = Variant(
        "ten-speakers",
        (
            "--manifest=<base>/ten_speakers.csv",
            f"--pretrained_encoder=<base>/{experiment.stage1_step}",
            "--verification_file=null",
            "--n_clusters=10",
            *FIRST,
            "--classifier_epochs=30",
            "--gated_epochs=1",
            "--classifier_init=random",
            "--batch_size=32",
            *NO_GATE,
        ),
        keep=(),
    )
    experiment.train([toy])
    kinds = {"reliable": [], "unreliable": []}
    for seed in experiment.seeds:
        epochs = [
            record
            for record in experiment.records(seed, toy.name)
            if record["phase"] == "classifier"
        ]
        for kind, curves in kinds.items():
            losses = [record.get(f"loss_{kind}") for record in epochs]
            curves.append(np.array(losses, dtype=float))
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel="mean loss")
    rows = []
    for n, (kind, curves) in enumerate(kinds.items()):
        curves = np.stack(curves)
        epochs = np.arange(1, curves.shape[1] + 1)
        looks = style(n)
        looks.pop("marker")
        axes.plot(epochs, curves.mean(axis=0), label=kind, **looks)
        axes.fill_between(
            epochs,
            curves.min(axis=0),
            curves.max(axis=0),
            color=looks["color"],
            alpha=0.2,
        )
        shown = [1, 2, 5, 10, 20, 30]
        rows.append(
            [f"{kind} labels", *(spread(curves[:, e - 1], 1, 2) for e in shown)]
        )
    axes.legend(title="pseudo-labels")
    save(figure, options.output_folder, "figure2")
    shares = experiment.values("reliable_share", toy.name, phase="clusters")
    return (
        markdown_table(["mean loss", *(f"epoch {e}" for e in shown)], rows)
        + f"\n\n{spread(shares, 100, 0)} % of the labels are reliable."
    )


def figure3(experiment, options):
    """Agreement of pseudo-labels and speakers."""
    experiment.train([WITHOUT])
    iterations = range(1, experiment.settings["n_iterations"] + 1)
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    rows = []

    def draw(axes, label, measure, values):
        means = [np.mean(found) for found in values]
        looks = style(len(axes.lines))
        axes.plot(iterations, means, label=f"{measure}, {label}", **looks)
        cells = [spread(found, 1, 3) for found in values]
        rows.append([measure, label, *cells])

    for measure in ("nmi", "ami"):
        shown = measure.upper()
        for label, name in (("without", WITHOUT.name), ("with", "base")):
            values = [
                experiment.values(measure, name, iteration=i, phase="clusters")
                for i in iterations
            ]
            draw(panels[0], f"{label} the gate", shown, values)
        draw(panels[1], "all", shown, values)  # the last, with the gate
        values = [
            after(experiment, "base", i, f"{measure}_selected")
            for i in iterations
        ]
        draw(panels[1], "selected", shown, values)
    for axes in panels:
        axes.set(xlabel="iteration", xticks=list(iterations))
        axes.legend()
    save(figure, options.output_folder, "figure3")
    return markdown_table(
        ["", "", *(f"iteration {i}" for i in iterations)], rows
    )


def gates(experiment, options):
    """Every gate in iteration 1, told nothing of the corpus."""
    names = {gate: f"gate-{gate}" for gate in GATES}
    # A preset's own correction stays: with the class's default scale it may do
    # harm.
    own = [CORRECT] if experiment.settings["correct_labels"] else []
    variants = [
        Variant(
            names[gate],
            (*(option for option in GATES[gate] if option not in own), *FIRST),
            CLASSIFIED,
        )
        for gate in GATES
    ]
    experiment.train([WITHOUT, *variants])
    shares = ("selected_share", "gate_precision", "gate_recall")
    shares += ("corrected_share", "correction_precision")
    rows = []
    names = {"none": WITHOUT.name, **names}
    for gate, name in names.items():
        found = [after(experiment, name, 1, figure) for figure in shares]
        eers = spread(after(experiment, name))
        rows.append([gate, eers, *(spread(of, 100, 0) for of in found)])
    header = ["gate", "EER %", "selected %", "precision %", "recall %"]
    return markdown_table([*header, "corrected %", "of these right %"], rows)


def selection(experiment, options):
    """Each criterion against the true EER, epoch by epoch."""
    experiment.train([Variant("study", ("--selection_study=True",))])
    kinds = ("Stage I", "classifier", "gated")
    found = {kind: phases(experiment, kind) for kind in kinds}
    rows = []
    for name in CRITERIA:
        row = [name]
        for kind in kinds:
            ranks, regrets = [], []
            for epochs in found[kind]:
                eers = np.array([epoch["eer"] for epoch in epochs])
                costs = np.array([criterion(epoch, name) for epoch in epochs])
                is_finite = np.isfinite(costs)
                if is_finite.sum() > 2:
                    rank = spearmanr(
                        costs[is_finite], eers[is_finite]
                    ).statistic
                    ranks.append(rank)
                regrets.append(eers[costs.argmin()] - eers.min())
            row += [spread(ranks, 1, 2), spread(regrets)]
        rows.append(row)
    header = ["criterion"]
    for kind in kinds:
        header += [f"{kind}: rank correlation", "regret, points of EER"]
    picked = markdown_table(header, rows)
    rows = []
    for name in CRITERIA:
        if name == "last":
            continue
        for patience in (2, 4):
            row = [name, patience]
            for kind in kinds:
                saved, regrets = [], []
                for epochs in found[kind]:
                    costs = [criterion(epoch, name) for epoch in epochs]
                    end = stop(costs, patience)
                    eers = np.array([epoch["eer"] for epoch in epochs])
                    best = int(np.argmin(costs[:end]))
                    regrets.append(eers[best] - eers[-1])
                    saved.append(1 - end / len(epochs))
                row += [spread(saved, 100, 0), spread(regrets)]
            rows.append(row)
    header = ["criterion", "patience"]
    for kind in kinds:
        header += [f"{kind}: epochs saved %", "EER minus the last epoch's"]
    return picked + "\n\n" + markdown_table(header, rows)


def phases(experiment, kind):
    """Returns the epochs of each phase of a kind, over seeds and iterations."""
    by_phase = {}
    for seed in experiment.seeds:
        for record in experiment.records(seed, "study"):
            # Stage I's phase has the name of its method.
            first = record["stage"] == 1 and record["phase"] != "ssps"
            if kind == ("Stage I" if first else record["phase"]) and (
                record.get("epoch")
            ):
                key = seed, record.get("iteration")
                by_phase.setdefault(key, []).append(record)
    return list(by_phase.values())


def stop(costs, patience):
    """Returns the epochs until `patience` epochs brought no improvement."""
    best, since = np.inf, 0
    for n, cost in enumerate(costs, 1):
        best, since = (cost, 0) if cost < best else (best, since + 1)
        if since == patience:
            return n
    return len(costs)


def steps(experiment, options):
    """Larger steps, each against the base at the same point."""
    last = experiment.settings["n_iterations"]
    size = experiment.settings["embedding_size"]
    centres = f"!name:lgl_plugin.nnet.losses.SubCentreClassifier [{size}]"
    own = experiment.settings["classifier_init"]
    other = {"random": "centroids", "centroids": "random"}[own]
    warm = experiment.settings["encoder_init"]
    new_start = {"first": "previous", "previous": "first"}[warm]
    start = {"encoder_init": new_start}
    if new_start == "first":
        # Centroids lie in the embedding space of the encoder that was
        # clustered.
        start["classifier_init"] = "random"
    sub_centres = Variant(
        "sub-centres", (f"--new_classifier={centres}", *FIRST), CLUSTERED
    )
    classifier_init = Variant(
        "classifier-init", (f"--classifier_init={other}", *FIRST), CLUSTERED
    )
    encoder_init = Variant(
        "encoder-init",
        (
            *(f"--{key}={value}" for key, value in start.items()),
            "--n_iterations=2",
            "--new_last_encoder=null",
        ),
        (*CLASSIFIED, "iter1/gated", "iter2/embeddings", "iter2/labels"),
    )
    large_margin = Variant("large-margin", ("--large_margin_epochs=4",), None)
    variants = {
        "three centres a pseudo-speaker": (sub_centres, 1, "gated"),
        f"classifier_init: {other}, not {own}": (classifier_init, 1, "gated"),
        f"{start}, not {warm}": (encoder_init, 2, "gated"),
        "large-margin fine-tuning": (large_margin, last, "large_margin"),
    }
    experiment.train([variant for variant, *_ in variants.values()])
    rows = []

    def compare(label, eers, iteration):
        base = np.array(after(experiment, "base", iteration))
        gain = spread(np.array(eers) - base)
        rows.append([label, iteration, spread(base), spread(eers), gain])

    for label, (variant, iteration, phase) in variants.items():
        eers = after(experiment, variant.name, iteration, phase=phase)
        compare(label, eers, iteration)
    settings = experiment.settings
    trials = trials_of(settings, "steps")
    eers = [
        Embedder(
            experiment.run_folder(seed), f"iter{last}/gated", experiment.device
        ).eer(trials, settings["trial_folder"], normed=True)
        for seed in experiment.seeds
    ]
    compare("AS-norm", eers, last)
    return markdown_table(
        ["step", "iteration", "base, EER %", "with it", "difference"], rows
    )


def ten_speakers(source, target):
    """Writes a manifest's part of ten speakers, 100 utterances each.

    These are the speakers with the most utterances. The paper also chose its
    ten by true labels, which the analysis needs.
    """
    # Only rows are counted: audio outside the data folder does no harm.
    speakers = load_manifest(source, "", allow_outside=True).speakers
    counts = np.bincount(speakers[speakers >= 0])
    if len(counts) < 10:
        raise ValueError(
            f"figure2 needs ten speakers with true labels, {source} names "
            f"{len(counts)}"
        )
    rows, rng = [], np.random.default_rng(0)
    for speaker in np.argsort(-counts, kind="stable")[:10]:
        own_rows = np.flatnonzero(speakers == speaker)
        rows += own_rows[np.sort(rng.permutation(len(own_rows))[:100])].tolist()
    write_part(source, target, rows)


ALL = (
    table1,
    table2,
    table3,
    table4,
    figure2,
    figure3,
    gates,
    selection,
    steps,
    study,
    backends,
    clusterings,
)


def check_data(names, experiment, options):
    """Refuses, before any training, tables whose data are missing.

    All trial lists, and the state of finished runs, are read.
    """
    for run in options.runs:
        read_state(run)
    by_speakers = {"figure2", "clusterings"} & {*names}
    if options.runs:  # finished runs have their own manifests
        by_speakers -= {"clusterings"}
    if by_speakers:
        settings = experiment.settings
        if not (settings["speaker_folder"] or settings["manifest"]):
            raise ValueError(
                f"{', '.join(sorted(by_speakers))}: there are no true "
                "speakers: leave --speaker_folder=False out"
            )
    if "table1" in names:
        options.lists = read_lists(options.lists)
    scored = {*names} - {"table1", "figure2", "figure3", "clusterings"}
    if options.runs:  # finished runs have their own trial lists
        scored -= {"backends"}
    if scored:
        trials_of(experiment.settings, ", ".join(sorted(scored)))


def read_lists(pairs):
    """Reads NAME=trial_list@audio_folder; trials and folder by name."""
    matches = [re.fullmatch("(.+?)=(.+?)@(.+)", pair) for pair in pairs]
    if not matches or None in matches:
        raise ValueError(
            "table1: give --lists NAME=trial_list@audio_folder, one or more"
        )
    parts = [match.groups() for match in matches]
    return {name: (read_trials(path, at), at) for name, path, at in parts}


def main():
    """Trains what the names on the command line need, and writes the tables."""
    functions = {function.__name__: function for function in ALL}
    parser = make_parser(__doc__, seeds="1,2,3")
    parser.add_argument("name", nargs="+", choices=functions)
    parser.add_argument("--small", action="store_true", help="presets for CPUs")
    parser.add_argument("--output_folder", default="results/paper")
    parser.add_argument(
        "--hparams", type=pathlib.Path, default=HERE / "hparams"
    )
    parser.add_argument("--jobs", type=count, default=1, help="runs at a time")
    parser.add_argument("--nproc", type=count, default=1, help="GPUs of a run")
    parser.add_argument("--lists", nargs="*", default=[], help="of table1")
    parser.add_argument("--runs", nargs="*", default=[], help="see above")
    options, overrides = parser.parse_known_args()
    size = "small_" if options.small else ""
    try:
        experiment = Experiment(
            HERE / "train_lgl.py",
            [options.hparams / f"{size}stage{stage}.yaml" for stage in (1, 2)],
            options.output_folder,
            options.seeds,
            options.jobs,
            overrides,
            options.nproc,
        )
        check_data(options.name, experiment, options)
    except (OSError, ValueError) as error:  # a mistyped option, for example
        parser.error(str(error))
    for name in options.name:
        with explained_errors(1, "--debug" in overrides):
            table = functions[name](experiment, options)
        with atomic_write(experiment.folder / f"{name}.md") as out:
            out.write(table + "\n")
        print(f"\n{functions[name].__doc__.splitlines()[0]}\n\n{table}\n")


if __name__ == "__main__":
    main()
