"""The parts of a run's page, as plain data for `page.Page`.

Each part takes the run's `Results` and yields blocks, none if its data are
missing. A section without blocks is not shown.
"""

import collections
from collections.abc import Iterator

import numpy as np

from lgl_plugin.evaluation.pseudo_labels import reliable
from lgl_plugin.report import figures
from lgl_plugin.report.clusters import clusters, embedding_map, recordings
from lgl_plugin.report.overview import interval
from lgl_plugin.report.page import Block, Command, Figure, Table
from lgl_plugin.report.results import PHASES, Results
from lgl_plugin.runs.differences import flatten
from lgl_plugin.runs.metrics_log import LABEL_FREE, cells

SHOWN = 20  # bad files, and messages of a log
# Columns of the table: heading, factor and number of decimals.
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
# Figures of an epoch: label, and lower end of the axis.
CURVES = {
    "pseudo_eer": ("EER of held-out pseudo-trials (%)", 0),
    "mean_cosine": ("mean cosine of held-out utterances", None),
    "effective_dimensions": ("effective dimensions", 0),
    "alignment": ("squared distance of an utterance's crops", 0),
    "uniformity": ("uniformity of held-out utterances", None),
    "loss": ("training loss", None),
    "teacher_entropy": ("teacher's entropy (share of the largest)", 0),
    "prototypes_used": ("prototypes that a batch uses", 0),
    "utterances_per_second": ("utterances per second", 0),
}


def error_rate_by_phase(results: Results) -> Iterator[Block]:
    """Yields EER and NMI over the phases."""
    present = {key for row in results.rows.values() for key in row}
    if present & {"eer", "nmi"}:
        yield Figure(
            "error_rate_by_phase",
            figures.error_rate_by_phase({results.name: [results.rows]}),
            "EER and NMI over the phases; the figures are in the table below.",
            "EER on the trial list and NMI of the pseudo-labels over the "
            "phases. Log-mel statistics are a baseline without a network.",
        )


def det(results: Results) -> Iterator[Block]:
    """Yields DET curves, one for the end of each iteration."""
    # Only the last phase of an iteration: more curves would be unreadable.
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
    """Yields pseudo-EER by epoch; without an EER, all label-free figures."""
    scored = any("eer" in row for row in results.rows.values())
    keys = *LABEL_FREE, "alignment", "uniformity"
    for key in keys[:1] if scored else keys:
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
            row[column] += interval(results, row[0])
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
    trusted = None
    for phase in PHASES:
        gate = results.gate(f"iter{number}/{phase}")
        if gate is None:
            continue
        rows, losses, tau = gate["rows"], gate["losses"], float(gate["tau"])
        groups, explained = {"all utterances": losses}, ""
        if results.speakers_known:
            speakers = results.manifest.speakers
            if trusted is None:
                labels = results.labels_by_row(number)
                trusted = reliable(speakers, labels)
            has_speaker = speakers[rows] >= 0
            groups = {
                "reliable": losses[trusted[rows]],
                "unreliable": losses[has_speaker & ~trusted[rows]],
                "speaker not known": losses[~has_speaker],
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


def training(results: Results) -> Iterator[Block]:
    """Yields loss, the teacher and throughput over the epochs."""
    keys = "loss", "teacher_entropy", "prototypes_used", "utterances_per_second"
    for key in keys:
        yield from _curve(results, key)


def _curve(results, key):
    """Yields the figure of a key, if an epoch's record has it."""
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


# The parts of each section, by its title, in the order of the page.
SECTIONS = {
    "Quality": (error_rate_by_phase, det, held_out, all_phases),
    "Loss-gated learning": (gates,),
    "Clusters": (clusters, embedding_map, recordings),
    "Training": (training,),
    "Warnings": (warnings,),
    "Settings and starts": (configuration, starts),
}
