"""The parts of a run's page, as plain data for `page.Page`.

Each takes the run's `Results` and yields blocks. A part that lacks its data
says so: a page is also wanted of a run that is half-way.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator

import numpy as np

from lgl_plugin.dataio.manifest import find
from lgl_plugin.evaluation import pseudo_labels
from lgl_plugin.report import figures, projection
from lgl_plugin.report.page import Block, Figure, Table, Text
from lgl_plugin.report.results import PHASES, Results
from lgl_plugin.runs.metrics_log import cells
from lgl_plugin.runs.settings import flatten
from lgl_plugin.training import health

MAP_GROUPS = len(figures.COLOURS)
SHOWN = 20  # bad files, and messages of a log
# Columns of the gate's table: heading, factor and number of decimals.
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


def overview(results: Results) -> Iterator[Block]:
    """Yields the most important figures and a word on true labels."""
    scored = {n: row["eer"] for n, row in results.rows.items() if "eer" in row}
    names = (*[*scored][-1:], "Stage I", "untrained")
    facts = {f"EER, {n}": f"{scored[n]:.1f} %" for n in names if n in scored}
    manifest = results.manifest
    if manifest is not None:
        facts["utterances"] = f"{len(manifest):,}"
        facts["duration"] = f"{manifest.durations.sum() / 3600:,.1f} h"
    minutes = _seconds(results.records) / 60
    facts["training and clustering"] = f"{minutes:,.1f} min"
    if results.steps:
        done = [step for step in results.steps if step in results.done]
        facts["steps done"] = f"{len(done)} of {len(results.steps)}"
    yield facts
    yield (
        "No true label trains anything. Where the manifest names speakers, "
        "they serve this page alone: NMI, AMI, reliability and the map of "
        "speakers were computed after the fact."
    )


def error_rate_by_phase(results: Results) -> Iterator[Block]:
    """Yields EER and NMI over the phases, and the table of all figures."""
    rows = results.rows
    present = {key for row in rows.values() for key in row}
    if present & {"eer", "nmi"}:
        alt = "; ".join(
            f"{name}: {figure} {row[key]:.{digits}f}"
            for name, row in rows.items()
            for key, figure, digits in (("eer", "EER %", 1), ("nmi", "NMI", 3))
            if key in row
        )
        yield Figure(
            "error_rate_by_phase",
            figures.error_rate_by_phase({results.name: [rows]}),
            f"EER and NMI over the phases. {alt}.",
            "EER on the trial list and NMI of the pseudo-labels over the "
            "phases. Log-mel statistics are the floor, no network.",
        )
    if "eer" not in present:
        yield "No EER: the run has no trial list, or none is scored."
    if "nmi" not in present:
        yield (
            "No NMI: there are no clusters yet, or the manifest names no "
            "speakers."
        )
    yield Table("All phases", *cells([rows]))


def gates(results: Results) -> Iterator[Block]:
    """Yields the losses that the gate saw and the shares that it selected."""
    rows = {
        n: row for n, row in results.rows.items() if "selected_share" in row
    }
    if not rows:
        yield "Stage II has not trained yet."
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
    shares = ", ".join(
        f"{name} {100 * row['selected_share']:.0f} %"
        for name, row in rows.items()
    )
    yield Figure(
        "selected",
        figures.epochs(records, line, label, 100.0, bottom=0, top=105),
        f"Share of the utterances selected, per epoch; at the ends: {shares}.",
        "Share of the utterances that the gate lets through, per epoch.",
    )
    used = [k for k in GATE_COLUMNS if any(k in row for row in rows.values())]
    yield Table(
        "The gate at each phase's end. Precision: share of the selected whose "
        "pseudo-label is reliable; recall: share of the reliable that are "
        "selected.",
        ["phase", *(GATE_COLUMNS[key][0] for key in used)],
        [
            [name, *(_number(row, key, *GATE_COLUMNS[key][1:]) for key in used)]
            for name, row in rows.items()
        ],
    )


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
            groups = {
                name: group for name, group in groups.items() if len(group)
            }
            explained = (
                "; reliable: the cluster's speaker is the utterance's own"
            )
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


def det(results: Results) -> Iterator[Block]:
    """Yields DET curves, one for the end of each iteration, and their table."""
    scores = results.scores()
    # Of an iteration the last phase: more curves could not be told apart.
    last = {name.split(",")[0]: name for name in scores}
    shown = {name: scores[name] for name in last.values()}
    if not shown:
        yield "No trial scores: no trial list, or not scored yet."
        return
    eers = {n: results.rows[n]["eer"] for n in shown if n in results.rows}
    yield Figure(
        "det",
        figures.det(shown),
        "Detection error trade-off curves with EERs of "
        + ", ".join(f"{rate:.1f} % ({name})" for name, rate in eers.items()),
        "Misses against false alarms at all thresholds, probit axes; a marker "
        "is where both are equal.",
    )
    labels = next(iter(shown.values()))[1]
    digits = {"eer": 1, "min_dcf_001": 3, "min_dcf_005": 3}
    rows = {name: results.rows.get(name, {}) for name in scores}
    yield Table(
        f"{int(labels.sum()):,} target and {int((~labels).sum()):,} non-target "
        "trials",
        ["phase", "EER %", "minDCF 0.01", "minDCF 0.05"],
        [
            [name, *(_number(row, key, 1, digits[key]) for key in digits)]
            for name, row in rows.items()
        ],
    )


def clusters(results: Results) -> Iterator[Block]:
    """Yields the sizes of the clusters and their agreement with speakers."""
    sizes, rows = {}, []
    for number in results.iterations:
        labelled = results.labels(number)
        if labelled is None:
            continue
        step = results.done.get(f"iter{number}/labels", {})
        # The number of clusters counts those that stayed empty too.
        counts = np.bincount(labelled[1], minlength=step.get("n_clusters", 0))
        sizes[f"iteration {number}"] = counts
        row = results.rows.get(f"iteration {number}, classifier", {})
        quartiles = np.percentile(counts, [0, 25, 50, 75, 100]).astype(int)
        rows.append(
            [
                f"iteration {number}",
                f"{len(counts):,}",
                f"{(counts == 0).sum():,}",
                *(f"{quartile:,}" for quartile in quartiles),
                *(_number(row, key, 1, 3) for key in ("nmi", "ami", "purity")),
                _number(row, "reliable_share", 100, 0),
            ]
        )
    if not sizes:
        yield "Nothing is clustered yet."
        return
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
    header = ["round", "clusters", "empty", "smallest", "25 %", "median"]
    header += ["75 %", "largest", "NMI", "AMI", "purity", "reliable %"]
    caption = "Sizes, and agreement with the speakers"
    yield Table(caption, header, rows, wide=True)


def embedding_map(results: Results) -> Iterator[Block]:
    """Yields maps of the latest embeddings, by pseudo-label and by speaker."""
    for number in reversed(results.iterations):
        store, labelled = results.embeddings(number), results.labels(number)
        if store is not None and labelled is not None:
            break
    else:
        yield "No embeddings with pseudo-labels yet."
        return
    utterances, labels = labelled
    if len(labels) < 5:
        yield "Too few utterances for a map."
        return
    if utterances != store.utterances:
        raise ValueError("the pseudo-labels are of other utterances")
    largest = np.argsort(-np.bincount(labels), kind="stable")[:MAP_GROUPS]
    chosen = projection.sample(labels, largest)
    points, spread = projection.project(store.vectors[chosen])
    order = {cluster: index for index, cluster in enumerate(largest)}
    groups = np.array([order.get(label, -1) for label in labels[chosen]])
    names = [f"cluster {cluster}" for cluster in largest]
    drawn = f"{len(chosen):,} of {len(labels):,} utterances"
    yield Figure(
        "map_clusters",
        figures.embedding_map(points, groups, names),
        f"Map of {drawn}, the {len(names)} largest clusters in colour.",
        f"By pseudo-label, iteration {number}: the {len(names)} largest "
        "clusters.",
        raster=True,
    )
    if results.speakers_known:
        rows = find(results.manifest.ids, [utterances[n] for n in chosen])
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
    if len(chosen) < len(labels):
        drawn += (
            f" (seed {projection.SEED}; up to half from clusters in colour)"
        )
    yield (
        f"Drawn: {drawn}. Unit length, principal components "
        f"({100 * spread:.0f} % of the variance), then t-SNE: neighbours mean "
        "something, distances between groups do not. The largest clusters "
        "need not be typical ones."
    )


def training(results: Results) -> Iterator[Block]:
    """Yields loss, held-out error and throughput over the epochs."""
    curves = {
        "throughput": ("utterances_per_second", "utterances per second", 0),
        "loss": ("loss", "training loss", None),
        "pseudo_eer": ("pseudo_eer", "EER of held-out pseudo-trials (%)", 0),
    }
    for name, (key, label, bottom) in curves.items():
        values = [record.get(key) for record in results.records]
        values = [value for value in values if value is not None]
        if not values:
            continue
        yield Figure(
            name,
            figures.epochs(results.records, {key: key}, label, bottom=bottom),
            f"{label} per epoch: first {values[0]:.4g}, last "
            f"{values[-1]:.4g}, lowest {min(values):.4g}, highest "
            f"{max(values):.4g}.",
            f"{label[0].upper()}{label[1:]}, per epoch.",
        )
    rows, phases = [], {}
    for record in results.records:
        if record.get("epoch") is not None:
            phase = record["stage"], record.get("iteration"), record["phase"]
            phases.setdefault(phase, []).append(record)
    for (stage, iteration, phase), records in phases.items():
        speeds = [r.get("utterances_per_second") or 0 for r in records]
        statistics = np.median(speeds), min(speeds), max(speeds)
        rows.append(
            [
                f"iteration {iteration}, {phase}" if stage == 2 else "Stage I",
                len(records),
                *(f"{value:,.0f}" for value in statistics),
                f"{_seconds(records) / 60:,.1f}",
            ]
        )
    if not rows:
        yield "No epoch is complete yet."
        return
    header = ["phase", "epochs", "utt/s, median", "lowest", "highest"]
    yield Table("Throughput", [*header, "minutes"], rows)


def configuration(results: Results) -> Iterator[Block]:
    """Yields every setting, a table for each stage."""
    if not results.settings:
        yield "state.json, which holds the settings, is not there."
    for stage, settings in results.settings.items():
        rows = list(flatten(settings))
        caption = f"{stage}: {len(rows)} settings"
        yield Table(caption, ["key", "is"], rows, folded=True)


def environment(results: Results) -> Iterator[Block]:
    """Yields the run's starts, with their commands, and its env.log."""
    if results.starts:
        header = ["time", "command", "commit", "device", "host"]
        rows = []
        for start in results.starts:
            versions = start.get("versions", {}).items()
            row = [str(start.get(name)) for name in header]
            rows.append([*row, ", ".join(f"{n} {v}" for n, v in versions)])
        header = [*header, "versions"]
        yield Table("Each start of the run", header, rows, prose=True)
    recorded = results.environment()
    if not recorded:
        yield "The run left no env.log."
        return
    yield (
        "SpeechBrain's env.log lists the packages of the pip that was found "
        "first, which need not be those that Python used."
    )
    yield Text("env.log", recorded)


def warnings(results: Results, failures: list[str]) -> Iterator[Block]:
    """Yields doubts about the run, unusable files and the logs' warnings.

    `failures` names the page's parts that could not be made.
    """
    bad = results.bad_files()
    doubts = [*_doubts(results)]
    doubts += [f"Could not be made: {line}" for line in failures]
    if bad:
        doubts.append(f"{len(bad):,} utterances could not be used.")
    yield doubts or "None."
    if bad:
        caption = f"bad_files.txt ({min(len(bad), SHOWN)} of {len(bad):,})"
        header = ["utterance", "reason"]
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


def _doubts(results):
    """Yields sentences about settings, figures and steps that look wrong."""
    for stage, settings in results.settings.items():
        if settings.get("selection") == "trials":
            yield (
                f"{stage} chose its epochs by the labelled trial list "
                "(selection: trials): its EER is no measure of learning "
                "without labels."
            )
    for _, warning in health.findings(results.records):
        yield warning
    floor = results.rows.get("log-mel statistics", {}).get("eer", np.inf)
    for name, row in results.rows.items():
        rate = row.get("eer", 0.0)
        if name != "untrained" and rate > floor:
            yield (
                f"{name}: an EER of {rate:.1f} % is above the floor of "
                f"{floor:.1f} % that log-mel statistics reach without a "
                "network."
            )
    for step, reason in results.failed.items():
        yield f"{step} failed ({reason}); the same command tries it again."
    for step in results.steps:
        if step not in results.done:
            yield f"The run is not finished; next step: {step}."
            break


def _seconds(records):
    """Returns the sum of the records' seconds."""
    return sum(record.get("seconds") or 0 for record in records)


def _number(row, key, factor, digits):
    """Returns a row's figure as text, empty where there is none."""
    return f"{factor * row[key]:.{digits}f}" if key in row else ""


# By the sections' titles, in the order of the page; `warnings` come before.
SECTIONS = {
    "Error rates by phase": error_rate_by_phase,
    "Loss-gated learning": gates,
    "Verification errors": det,
    "Clusters": clusters,
    "Map of the embeddings": embedding_map,
    "Training and throughput": training,
    "Configuration": configuration,
    "Environment": environment,
}
