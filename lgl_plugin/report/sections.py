"""The parts of a run's page, as plain data for `page.Page`.

Each takes the run's `Results` and yields blocks; one that lacks its data
yields none, and a section of none is not shown.
"""

import collections
import re
import shlex
from collections.abc import Iterator

import numpy as np

from lgl_plugin.dataio.manifest import find
from lgl_plugin.evaluation import pseudo_labels
from lgl_plugin.report import figures, projection
from lgl_plugin.report.page import (
    Block,
    Command,
    Figure,
    Recordings,
    Table,
    Verdict,
)
from lgl_plugin.report.results import PHASES, Results
from lgl_plugin.runs.metrics_log import COLUMNS, LABEL_FREE, cells
from lgl_plugin.runs.settings import flatten
from lgl_plugin.training import health

MAP_GROUPS = len(figures.COLOURS)
SHOWN = 20  # bad files, and messages of a log
CLUSTERS, FILES = 100, 5  # clusters that are listed, and files of each
FLOOR = "log-mel statistics"
# Of tables: heading, factor and number of decimals.
GATE_COLUMNS = {
    "tau": ("τ", 1, 2),
    "selected_share": ("selected %", 100, 0),
    "gate_precision": ("precision %", 100, 0),
    "gate_recall": ("recall %", 100, 0),
    "nmi": ("NMI, all", 1, 3),
    "nmi_selected": ("NMI, selected", 1, 3),
    "corrected_share": ("corrected %", 100, 0),
    "correction_precision": ("of these right %", 100, 0),
}
QUARTILES = ("smallest", "25 %", "median", "75 %", "largest")
CLUSTER_COLUMNS = {
    **{name: (name, 1, 0) for name in ("clusters", "empty", *QUARTILES)},
    "nmi": ("NMI", 1, 3),
    "ami": ("AMI", 1, 3),
    "purity": ("purity", 1, 3),
    "reliable_share": ("reliable %", 100, 0),
}
# Figures of an epoch: label and lower end of the axis.
CURVES = {
    "pseudo_eer": ("EER of held-out pseudo-trials (%)", 0),
    "mean_cosine": ("mean cosine of held-out utterances", None),
    "effective_dimensions": ("effective dimensions", 0),
    "loss": ("training loss", None),
    "utterances_per_second": ("utterances per second", 0),
}


def overview(results: Results, failures: list[str]) -> Iterator[Block]:
    """Yields the verdict with its reasons, the main figures, what to do next.

    `failures` names the page's parts that could not be made.
    """
    doubts = [*_doubts(results)]
    doubts += [f"Could not be made: {line}" for line in failures]
    done = [step for step in results.steps if step in results.done]
    left = [step for step in results.steps if step not in results.done]
    verdict = "Healthy: no check finds anything wrong."
    if doubts:
        verdict = f"Look at what follows: {len(doubts)} in all."
    if left:
        verdict = f"Not finished, next step: {left[0]}. {verdict}"
    yield Verdict(not doubts, verdict)
    if doubts:
        yield doubts
    facts = _quality(results)
    if results.manifest is not None:
        facts["utterances"] = f"{len(results.manifest):,}"
        hours = results.manifest.durations.sum() / 3600
        facts["duration"] = f"{hours:,.1f} h"
    seconds = sum(record.get("seconds") or 0 for record in results.records)
    facts["training and clustering"] = f"{seconds / 60:,.1f} min"
    if results.steps:
        facts["steps done"] = f"{len(done)} of {len(results.steps)}"
    yield facts
    yield from _next_command(results, bool(left or results.failed))


def _quality(results):
    """Returns the latest EER and its distance to the floor, or what there is.

    Label-free figures come after these.
    """
    facts, rows = {}, results.rows
    rates = {name: row["eer"] for name, row in rows.items() if "eer" in row}
    if rates:
        name, rate = list(rates.items())[-1]
        facts[f"EER, {name} (95 %)"] = f"{rate:.1f} %{_interval(results, name)}"
        key, under = _same_backend(rows[name], rows.get(FLOOR, {}))
        floor = rows.get(FLOOR, {}).get(key, rows[name][key])
        gap = floor - rows[name][key]
        if gap:
            side = "below" if gap > 0 else "above"
            title = f"{side} the {floor:.1f} % of {FLOOR}{under}"
            facts[title] = f"{abs(gap):.1f} points"
    for key in LABEL_FREE:
        heading, factor, digits = COLUMNS[key]
        values = [row[key] for row in rows.values() if key in row]
        if values:
            value = f"{factor * values[-1]:.{digits}f}"
            facts[f"{heading}, held out"] = value
    return facts


def _same_backend(row, floor):
    """Returns the figure by which a row and the floor's compare, in words too.

    The floor's embeddings are whitened: the cosine alone would hold that
    against a network.
    """
    if "eer_backend" in row.keys() & floor.keys():
        return "eer_backend", ", both under the back-end"
    return "eer", ""


def _next_command(results, unfinished):
    """Yields the command that goes on with a run, or uses its encoder."""
    start = results.starts[-1].get("command") if results.starts else None
    folder = results.folder
    export = folder / "export" / f"iter{max(results.iterations, default=0)}"
    if unfinished and start:
        yield Command("The same command goes on where the run is:", start)
    elif not unfinished and results.iterations:
        command = ["lgl", "export", str(folder)]
        reason = "Next, export the encoder for SpeechBrain:"
        if export.exists():
            command = ["lgl", "compare", str(export), "A.wav", "B.wav"]
            reason = "Next, ask the encoder who speaks in two files:"
        yield Command(reason, shlex.join(command))
    elif not unfinished and start:
        command = re.sub(r"stage1(?=\.yaml)", "stage2", start)
        yield Command(
            "Next, Stage II, with the options that both stages have:", command
        )


def _doubts(results):
    """Yields sentences about settings, figures and steps that look wrong."""
    for _, warning in health.findings(results.records):
        yield warning
    of_floor = results.rows.get(FLOOR, {})
    for name, row in results.rows.items():
        key, under = _same_backend(row, of_floor)
        rate, floor = row.get(key, 0.0), of_floor.get(key, np.inf)
        if name != "untrained" and rate > floor:
            yield (
                f"{name}: an EER of {rate:.1f} % is above the floor of "
                f"{floor:.1f} % that log-mel statistics reach without a "
                f"network{under}."
            )
    for step, reason in results.failed.items():
        yield f"{step} failed ({reason}); the same command tries it again."


def _interval(results, phase):
    """Returns the interval of a phase's EER in brackets; empty for none."""
    interval = results.intervals.get(phase)
    return " ({:.1f}-{:.1f})".format(*interval) if interval else ""


def error_rate_by_phase(results: Results) -> Iterator[Block]:
    """Yields EER and NMI over the phases."""
    present = {key for row in results.rows.values() for key in row}
    if present & {"eer", "nmi"}:
        yield Figure(
            "error_rate_by_phase",
            figures.error_rate_by_phase({results.name: [results.rows]}),
            "EER and NMI over the phases; the figures are in the table below.",
            "EER on the trial list and NMI of the pseudo-labels over the "
            "phases. Log-mel statistics are the floor, no network.",
        )


def det(results: Results) -> Iterator[Block]:
    """Yields DET curves, one for the end of each iteration."""
    # Of an iteration the last phase: more curves could not be told apart.
    last = {name.split(",")[0]: name for name in results.scored}
    shown = {name: results.scores(name) for name in last.values()}
    if shown:
        labels = next(iter(shown.values()))[1]
        yield Figure(
            "det",
            figures.det(shown),
            "Detection error trade-off curves of " + ", ".join(shown),
            f"Misses against false alarms in {int(labels.sum()):,} target and "
            f"{int((~labels).sum()):,} non-target trials, probit axes; a "
            "marker is where both are equal.",
        )


def held_out(results: Results) -> Iterator[Block]:
    """Yields pseudo-EER by epoch and, without an EER, what else is measured."""
    scored = any("eer" in row for row in results.rows.values())
    for key in LABEL_FREE[:1] if scored else LABEL_FREE:
        yield from _curve(results, key)


def all_phases(results: Results) -> Iterator[Block]:
    """Yields the table of all figures, with the interval of each EER."""
    header, rows = cells([results.rows])
    if not rows:
        return
    if results.intervals:
        column = header.index("EER %")
        header[column] += " (95 %)"
        for row in rows:
            row[column] += _interval(results, row[0])
    yield Table("All phases", header, rows)
    if {"NMI", "AMI"} & {*header}:
        yield (
            "No true label trains anything: NMI, AMI, reliability and the map "
            "of speakers were computed after the fact, for this page."
        )
    if "pseudo-EER %" in header:
        yield (
            "Without labels, on held-out utterances at the end of the phase: "
            "the pseudo-EER takes two crops of an utterance for one speaker "
            "and crops of two for two (50 % is chance); the mean cosine of "
            "different utterances comes near 1, and the dimensions in which "
            "they vary near 1, where embeddings collapse."
        )


def gates(results: Results) -> Iterator[Block]:
    """Yields the losses that the gate saw and the shares that it selected."""
    rows = results.rows.items()
    rows = {name: row for name, row in rows if "selected_share" in row}
    if not rows:
        return
    for number in results.iterations:
        yield from _losses(results, number)
    records = results.records
    if any("loss_reliable" in record for record in records):
        lines = {"loss_reliable": "reliable", "loss_unreliable": "unreliable"}
        yield Figure(
            "reliability",
            figures.epochs(records, lines, "mean loss", bottom=0),
            "Mean loss of utterances with reliable and with unreliable "
            "pseudo-labels, per epoch.",
            "Mean loss per epoch of utterances whose pseudo-label is reliable "
            "and of the others (paper, figure 2).",
        )
    line, label = {"selected_share": "selected"}, "share selected (%)"
    yield Figure(
        "selected",
        figures.epochs(records, line, label, 100.0, bottom=0, top=105),
        "Share of the utterances selected, per epoch; those at the ends are "
        "in the table below.",
        "Share of the utterances that the gate lets through, per epoch.",
    )
    caption = "The gate at each phase's end."
    if results.speakers_known:
        caption += (
            " Precision: share of the selected whose pseudo-label is "
            "reliable; recall: share of the reliable that are selected."
        )
    yield Table(caption, *cells([rows], GATE_COLUMNS))


def _losses(results, number):
    """Yields the histograms of an iteration's losses, phase by phase."""
    reliable = None
    for phase in PHASES:
        gate = results.gate(f"iter{number}/{phase}")
        if gate is None:
            continue
        rows, losses, tau = gate["rows"], gate["losses"], float(gate["tau"])
        groups, explained = {"all utterances": losses}, ""
        if results.speakers_known:
            speakers = results.manifest.speakers
            if reliable is None:
                reliable = _reliable(speakers, results.labels_by_row(number))
            known = speakers[rows] >= 0
            groups = {
                "reliable": losses[reliable[rows]],
                "unreliable": losses[known & ~reliable[rows]],
                "speaker not known": losses[~known],
            }
            groups = {n: group for n, group in groups.items() if len(group)}
            explained = "; reliable: the cluster's speaker is its own"
        threshold = f"τ = {tau:.2f}" if np.isfinite(tau) else "no threshold"
        share = f"{100 * gate['selected'].mean():.0f} % selected"
        medians = ", ".join(
            f"median of {name} {np.nanmedian(group):.2f}"
            for name, group in groups.items()
        )
        name = f"iteration {number}, {phase}"
        yield Figure(
            f"losses_{number}_{phase}",
            figures.losses(groups, tau),
            f"Histogram of {len(losses):,} losses in {name}: {medians}; "
            f"{threshold}, {share}.",
            f"Losses in the last epoch of {name}: {threshold}, {share}"
            f"{explained}.",
        )


def _reliable(speakers, labels):
    """Returns a mask of the utterances with a reliable pseudo-label."""
    reliable = np.zeros(len(speakers), bool)
    known = labels >= 0
    reliable[known] = pseudo_labels.reliable(speakers[known], labels[known])
    return reliable


def clusters(results: Results) -> Iterator[Block]:
    """Yields the sizes of the clusters and their agreement with speakers."""
    sizes, rows = {}, {}
    for number in results.iterations:
        labelled = results.labels(number)
        if labelled is None:
            continue
        name = f"iteration {number}"
        step = results.done.get(f"iter{number}/labels", {})
        # The number of clusters counts those that stayed empty too.
        counts = np.bincount(labelled[1], minlength=step.get("n_clusters", 0))
        quartiles = np.percentile(counts, [0, 25, 50, 75, 100]).astype(int)
        sizes[name] = counts
        rows[name] = {
            **results.rows.get(f"{name}, classifier", {}),
            **dict(zip(QUARTILES, quartiles)),
            "clusters": len(counts),
            "empty": (counts == 0).sum(),
        }
    if not sizes:
        return
    yield Table("Utterances per cluster", *cells([rows], CLUSTER_COLUMNS))
    if results.speakers_known:
        speakers = results.manifest.speakers
        sizes["true speakers"] = np.bincount(speakers[speakers >= 0])
    yield Figure(
        "cluster_sizes",
        figures.cluster_sizes(sizes),
        "Sizes of the clusters from the largest to the smallest: "
        + "; ".join(
            f"{name}, {len(counts):,} from {max(counts):,} to {min(counts):,}"
            for name, counts in sizes.items()
        ),
        "Utterances per cluster, from the largest cluster to the smallest.",
    )


def embedding_map(results: Results) -> Iterator[Block]:
    """Yields maps of the latest embeddings, by pseudo-label and by speaker."""
    for number in reversed(results.iterations):
        store, labelled = results.embeddings(number), results.labels(number)
        if store is not None and labelled is not None:
            break
    else:
        return
    utterances, labels = labelled
    if len(labels) < 5:
        return  # t-SNE needs neighbours
    largest = np.argsort(-np.bincount(labels), kind="stable")[:MAP_GROUPS]
    chosen = projection.sample(labels, largest)
    shown = [utterances[n] for n in chosen]
    points, spread = projection.project(store.rows(shown))
    order = {cluster: index for index, cluster in enumerate(largest)}
    groups = np.array([order.get(label, -1) for label in labels[chosen]])
    names = [f"cluster {cluster}" for cluster in largest]
    drawn = f"{len(chosen):,} of {len(labels):,} utterances"
    seed = f" (seed {projection.SEED}; up to half from clusters in colour)"
    yield Figure(
        "map_clusters",
        figures.embedding_map(points, groups, names),
        f"Map of {drawn}, the {len(names)} largest clusters in colour.",
        f"By pseudo-label, iteration {number}: the {len(names)} largest "
        "clusters.",
        raster=True,
    )
    if results.speakers_known:
        rows = find(results.manifest.ids, shown)
        speakers = results.manifest.speakers[rows]
        colours = {}
        for index in range(len(names)):
            members = speakers[(groups == index) & (speakers >= 0)]
            if len(members):
                colours.setdefault(np.bincount(members).argmax(), index)
        by_speaker = np.array([colours.get(each, -1) for each in speakers])
        names = [f"speaker of {name}" for name in names]
        yield Figure(
            "map_speakers",
            figures.embedding_map(points, by_speaker, names),
            f"The same map; in colour, the main speakers of these clusters: "
            f"{len(colours)} speakers.",
            "By true speaker: the main speaker of each of these clusters, in "
            "the cluster's colour (the first one's, if it leads several).",
            raster=True,
        )
    yield (
        f"Drawn: {drawn}{seed if len(chosen) < len(labels) else ''}. "
        f"Unit length, principal components ({100 * spread:.0f} % of the "
        "variance), then t-SNE: neighbours mean something, distances between "
        "groups do not. The largest clusters need not be typical ones."
    )


def recordings(results: Results) -> Iterator[Block]:
    """Yields the largest clusters of the latest iteration, with some files."""
    for number in reversed(results.iterations):
        labelled = results.labels(number)
        if labelled is not None:
            break
    else:
        return
    utterances, labels = labelled
    counts = np.bincount(labels)
    order, ends = np.argsort(labels, kind="stable"), np.cumsum(counts)
    largest = np.argsort(-counts, kind="stable")[:CLUSTERS]
    chosen = {}
    for cluster in largest[counts[largest] > 0]:
        members = order[ends[cluster] - counts[cluster] : ends[cluster]]
        # Evenly through the manifest: its first files may be one session's.
        places = np.linspace(0, len(members) - 1, FILES).astype(int)
        title = f"cluster {cluster}: {len(members):,} utterances"
        chosen[title] = [utterances[n] for n in members[np.unique(places)]]
    names = [name for group in chosen.values() for name in group]
    players = dict.fromkeys(names, "")
    if results.manifest is not None:
        rows = find(results.manifest.ids, names)
        players = {n: results.player(row) for n, row in zip(names, rows)}
    yield Recordings(
        f"{len(chosen):,} of {np.count_nonzero(counts):,} clusters, iteration "
        f"{number}, the largest first, with some of their files",
        {t: [(n, players[n]) for n in chosen[t]] for t in chosen},
    )


def training(results: Results) -> Iterator[Block]:
    """Yields loss and throughput over the epochs."""
    for key in ("loss", "utterances_per_second"):
        yield from _curve(results, key)


def _curve(results, key):
    """Yields the figure of a key of the epochs' records, if one has it."""
    label, bottom = CURVES[key]
    values = [record.get(key) for record in results.records]
    values = [value for value in values if value is not None]
    if values:
        yield Figure(
            key,
            figures.epochs(results.records, {key: key}, label, bottom=bottom),
            f"{label} per epoch: first {values[0]:.4g}, last "
            f"{values[-1]:.4g}, lowest {min(values):.4g}, highest "
            f"{max(values):.4g}.",
            f"{label[0].upper()}{label[1:]}, per epoch.",
        )


def starts(results: Results) -> Iterator[Block]:
    """Yields the starts of the run, with their commands and machines."""
    for start in results.starts:
        code = {"commit": start.get("commit"), **start.get("versions", {})}
        code = ", ".join(f"{name} {value}" for name, value in code.items())
        place = f"{start.get('host')} ({start.get('device')})"
        reason = f"Started at {start.get('time')} on {place}: {code}"
        yield Command(reason, str(start.get("command")))


def configuration(results: Results) -> Iterator[Block]:
    """Yields every setting, a table for each stage."""
    for stage, settings in results.settings.items():
        rows = list(flatten(settings))
        caption = f"{stage}: {len(rows)} settings"
        yield Table(caption, ["key", "is"], rows, folded=True)


def warnings(results: Results) -> Iterator[Block]:
    """Yields unusable files and the logs' warnings."""
    bad = results.bad_files()
    if bad:
        caption = f"{len(bad):,} utterances could not be used"
        header = ["utterance", "reason"]
        if len(bad) > SHOWN:
            caption += f": the first {SHOWN}, all are in bad_files.txt"
        yield Table(caption, header, bad[:SHOWN], folded=True)
    times, last = collections.Counter(), {}
    for log, time, *message in results.log_entries():
        entry = (log, *message)
        times[entry] += 1
        last[entry] = time
    if times:
        latest = sorted(last, key=last.get)[-SHOWN:]
        yield Table(
            f"Warnings and errors in the logs ({len(latest)} of {len(times)})",
            ["log", "level", "message", "times", "last"],
            [[*entry, times[entry], last[entry]] for entry in latest],
            folded=True,
        )


# By the sections' titles, in the order of the page.
SECTIONS = {
    "Quality": (error_rate_by_phase, det, held_out, all_phases),
    "Loss-gated learning": (gates,),
    "Clusters": (clusters, embedding_map, recordings),
    "Training": (training,),
    "Warnings": (warnings,),
    "Settings and starts": (configuration, starts),
}
