"""The sections of a run's page, each from what the run has left so far.

Each takes the page and the run's `Results`. A section that lacks its data says
so: a page is also wanted of a run that is half-way.
"""

import collections

import numpy as np

from lgl_plugin.dataio.manifest import find
from lgl_plugin.evaluation import pseudo_labels
from lgl_plugin.report import figures, projection
from lgl_plugin.report.results import PHASES
from lgl_plugin.runs.metrics_log import cells
from lgl_plugin.runs.settings import flatten
from lgl_plugin.training import health

MAP_GROUPS = 7  # as many as there are colours
WARNINGS = "Warnings"
SHOWN = 20  # bad files, and messages of a log


def overview(page, results):
    """What one wants to know first.

    Example
    -------
    >>> from lgl_plugin.report.page import Page
    >>> from lgl_plugin.report.results import Results
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "metrics.jsonl").write_text(
    ...     '{"stage": 0, "phase": "untrained", "eer": 38.0}'
    ... )
    >>> page = Page(folder / "report", "Run")
    >>> overview(page, Results(folder))
    >>> "<dt>EER, untrained</dt><dd>38.0 %</dd>" in page.introduction[0]
    True
    """
    scored = {n: row["eer"] for n, row in results.rows.items() if "eer" in row}
    facts = {f"EER, {name}": f"{scored[name]:.1f} %" for name in [*scored][-1:]}
    for name in ("Stage I", "untrained"):
        if name in scored and f"EER, {name}" not in facts:
            facts[f"EER, {name}"] = f"{scored[name]:.1f} %"
    manifest = results.manifest
    if manifest is not None:
        facts["utterances"] = f"{len(manifest):,}"
        facts["duration"] = f"{manifest.durations.sum() / 3600:,.1f} h"
    seconds = sum(record.get("seconds") or 0 for record in results.records)
    facts["training and clustering"] = f"{seconds / 60:,.1f} min"
    if results.steps:
        done = [step for step in results.steps if step in results.done]
        facts["steps done"] = f"{len(done)} of {len(results.steps)}"
    page.facts(facts)
    page.paragraph(
        "No true label trains anything. Where the manifest names speakers, "
        "they serve this page alone: NMI, AMI, reliability and the map of "
        "speakers were computed after the fact."
    )
    # It stands first and is written last, when it is known what failed.
    page.section(WARNINGS)


def journey(page, results):
    """EER and NMI over the phases, and the table of all figures.

    Example
    -------
    >>> from lgl_plugin.report.page import Page
    >>> from lgl_plugin.report.results import Results
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "metrics.jsonl").write_text(
    ...     '{"stage": 0, "phase": "untrained", "eer": 38.0}'
    ... )
    >>> page = Page(folder / "report", "Run")
    >>> journey(page, Results(folder))
    >>> "untrained: EER % 38.0" in page.parts[0]
    True
    """
    page.section("Journey")
    rows = results.rows
    if any("eer" in row or "nmi" in row for row in rows.values()):
        alt = "; ".join(
            f"{name}: {figure} {row[key]:.{digits}f}"
            for name, row in rows.items()
            for key, figure, digits in (("eer", "EER %", 1), ("nmi", "NMI", 3))
            if key in row
        )
        page.figure(
            "journey",
            figures.journey({results.name: [rows]}),
            f"EER and NMI over the phases. {alt}.",
            "EER on the trial list and NMI of the pseudo-labels over the "
            "phases. Log-mel statistics are the floor, no network.",
        )
    if not any("eer" in row for row in rows.values()):
        page.paragraph("No EER: the run has no trial list, or none is scored.")
    if not any("nmi" in row for row in rows.values()):
        page.paragraph(
            "No NMI: there are no clusters yet, or the manifest names no "
            "speakers."
        )
    page.table("All phases", *cells([rows]))


def gates(page, results):
    """What the gate saw and let through.

    Example
    -------
    >>> from lgl_plugin.report.page import Page
    >>> from lgl_plugin.report.results import Results
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "metrics.jsonl").write_text(
    ...     '{"stage": 2, "iteration": 1, "phase": "gated", "epoch": 1,'
    ...     ' "selected_share": 0.75, "tau": 2.0}'
    ... )
    >>> page = Page(folder / "report", "Run")
    >>> gates(page, Results(folder))
    >>> "<td>2.00</td><td>75</td>" in page.parts[-1]
    True
    """
    page.section("Loss-gated learning")
    columns = {
        "tau": ("τ", 1, 2),
        "selected_share": ("selected %", 100, 0),
        "gate_precision": ("precision %", 100, 0),
        "gate_recall": ("recall %", 100, 0),
        "nmi": ("NMI, all", 1, 3),
        "nmi_selected": ("NMI, selected", 1, 3),
        "corrected_share": ("corrected %", 100, 0),
        "correction_precision": ("of these right %", 100, 0),
    }
    rows = {
        name: row
        for name, row in results.rows.items()
        if "selected_share" in row
    }
    if not rows:
        page.paragraph("Stage II has not trained yet.")
        return
    for number in results.iterations:
        _losses(page, results, number)
    records = results.records
    if any("loss_reliable" in record for record in records):
        page.figure(
            "reliability",
            figures.epochs(
                records,
                {"loss_reliable": "reliable", "loss_unreliable": "unreliable"},
                "mean loss",
                bottom=0,
            ),
            "Mean loss of utterances with reliable and with unreliable "
            "pseudo-labels, per epoch.",
            "Mean loss per epoch of utterances whose pseudo-label is reliable "
            "and of the others (paper, figure 2).",
        )
    shares = ", ".join(
        f"{name} {100 * row['selected_share']:.0f} %"
        for name, row in rows.items()
    )
    page.figure(
        "selected",
        figures.epochs(
            records,
            {"selected_share": "selected"},
            "share selected (%)",
            100.0,
            0,
            105,
        ),
        f"Share of the utterances selected, per epoch; at the ends: {shares}.",
        "Share of the utterances that the gate lets through, per epoch.",
    )
    used = [key for key in columns if any(key in r for r in rows.values())]
    page.table(
        "The gate at each phase's end. Precision: share of the selected whose "
        "pseudo-label is reliable; recall: share of the reliable that are "
        "selected.",
        ["phase", *(columns[key][0] for key in used)],
        [
            [name, *(_number(row, key, *columns[key][1:]) for key in used)]
            for name, row in rows.items()
        ],
    )


def _losses(page, results, number):
    """The histograms of a round's losses, phase by phase."""
    trusted = None
    for phase in PHASES:
        gate = results.gate(f"iter{number}/{phase}")
        if gate is None:
            continue
        rows, losses, tau = gate["rows"], gate["losses"], float(gate["tau"])
        groups, told = {"all utterances": losses}, ""
        if results.speakers_known:
            speakers = results.manifest.speakers
            if trusted is None:
                trusted = _reliable(speakers, results.pseudo(number))
            known = speakers[rows] >= 0
            groups = {
                "reliable": losses[trusted[rows]],
                "unreliable": losses[known & ~trusted[rows]],
                "speaker not known": losses[~known],
            }
            groups = {
                name: group for name, group in groups.items() if len(group)
            }
            told = "; reliable: the cluster's speaker is the utterance's own"
        threshold = f"τ = {tau:.2f}" if np.isfinite(tau) else "no threshold"
        share = f"{100 * gate['selected'].mean():.0f} % selected"
        medians = ", ".join(
            f"median of {name} {np.nanmedian(group):.2f}"
            for name, group in groups.items()
        )
        name = f"iteration {number}, {phase}"
        page.figure(
            f"losses_{number}_{phase}",
            figures.losses(groups, tau),
            f"Histogram of {len(losses):,} losses in {name}: {medians}; "
            f"{threshold}, {share}.",
            f"Losses in the last epoch of {name}: {threshold}, {share}{told}.",
        )


def _reliable(speakers, pseudo):
    """Which of all utterances have a reliable pseudo-label, bool (N,)."""
    trusted = np.zeros(len(speakers), bool)
    labelled = pseudo >= 0
    trusted[labelled] = pseudo_labels.reliable(
        speakers[labelled], pseudo[labelled]
    )
    return trusted


def det(page, results):
    """DET curves, one for the end of each round.

    Example
    -------
    >>> from lgl_plugin.utils.files import save_arrays
    >>> from lgl_plugin.report.page import Page
    >>> from lgl_plugin.report.results import Results
    >>> folder = getfixture("tmp_path")
    >>> path = folder / "stage1" / "scores.npz"
    >>> save_arrays(path, scores=[0.9, 0.1], labels=[True, False])
    >>> _ = (folder / "metrics.jsonl").write_text(
    ...     '{"stage": 1, "phase": "after simclr", "eer": 0.0}'
    ... )
    >>> page = Page(folder / "report", "Run")
    >>> det(page, Results(folder))
    >>> "with EERs of 0.0 % (Stage I)" in page.parts[0]
    True
    """
    page.section("Verification errors")
    scores = results.scores()
    # Of a round the last phase: more curves could not be told apart.
    last = {name.split(",")[0]: name for name in scores}
    shown = {name: scores[name] for name in last.values()}
    if not shown:
        page.paragraph("No trial scores: no trial list, or not scored yet.")
        return
    labels = next(iter(shown.values()))[1]
    eers = {n: results.rows[n]["eer"] for n in shown if n in results.rows}
    page.figure(
        "det",
        figures.det(shown),
        "Detection error trade-off curves with EERs of "
        + ", ".join(f"{rate:.1f} % ({name})" for name, rate in eers.items()),
        "Misses against false alarms at all thresholds, probit axes; a marker "
        "is where both are equal.",
    )
    columns = {"eer": 1, "min_dcf_001": 3, "min_dcf_005": 3}
    rows = [
        [name]
        + [_number(results.rows.get(name, {}), key, 1, digits)
           for key, digits in columns.items()]
        for name in scores
    ]  # fmt: skip
    page.table(
        f"{int(labels.sum()):,} target and {int((~labels).sum()):,} non-target "
        "trials",
        ["phase", "EER %", "minDCF 0.01", "minDCF 0.05"],
        rows,
    )


def clusters(page, results):
    """How large the clusters are.

    Example
    -------
    >>> from lgl_plugin.dataio.labels import write_labels
    >>> from lgl_plugin.report.page import Page
    >>> from lgl_plugin.report.results import Results
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "metrics.jsonl").write_text("")
    >>> path = folder / "iter1" / "labels" / "labels.csv"
    >>> path.parent.mkdir(parents=True)
    >>> write_labels(path, ["a", "b", "c"], np.array([0, 1, 0]))
    >>> page = Page(folder / "report", "Run")
    >>> clusters(page, Results(folder))
    >>> "iteration 1, 2 from 2 to 1" in page.parts[0]
    True
    """
    page.section("Clusters")
    sizes, rows = {}, []
    for number in results.iterations:
        found = results.labels(number)
        if found is None:
            continue
        step = results.done.get(f"iter{number}/labels", {})
        counts = np.bincount(found[1], minlength=step.get("n_clusters", 0))
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
        page.paragraph("Nothing is clustered yet.")
        return
    if results.speakers_known:
        speakers = results.manifest.speakers
        sizes["true speakers"] = np.bincount(speakers[speakers >= 0])
    page.figure(
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
    page.table(
        "Sizes, and agreement with the speakers", header, rows, wide=True
    )


def embedding_map(page, results):
    """Where the utterances of the latest round lie.

    Example
    -------
    >>> from lgl_plugin.dataio.labels import write_labels
    >>> from lgl_plugin.inference.store import Embeddings
    >>> from lgl_plugin.dataio.manifest import Strings
    >>> from lgl_plugin.report.page import Page
    >>> from lgl_plugin.report.results import Results
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "metrics.jsonl").write_text("")
    >>> names, vectors = [*"abcdef"], np.repeat(np.eye(2), 3, axis=0)
    >>> store = Embeddings(Strings(names), vectors.astype(np.float32))
    >>> store.save(folder / "iter1" / "embeddings")
    >>> path = folder / "iter1" / "labels" / "labels.csv"
    >>> path.parent.mkdir()
    >>> write_labels(path, names, np.array([0, 0, 0, 1, 1, 1]))
    >>> page = Page(folder / "report", "Run")
    >>> embedding_map(page, Results(folder))
    >>> "6 of 6 utterances, the 2 largest clusters" in page.parts[0]
    True
    """
    page.section("Map of the embeddings")
    for number in reversed(results.iterations):
        found, labelled = results.embeddings(number), results.labels(number)
        if found is not None and labelled is not None:
            break
    else:
        page.paragraph("No embeddings with pseudo-labels yet.")
        return
    utterances, labels = labelled
    if len(labels) < 5:
        page.paragraph("Too few utterances for a map.")
        return
    if utterances != found.utterances:
        raise ValueError("the pseudo-labels are of other utterances")
    largest = np.argsort(-np.bincount(labels), kind="stable")[:MAP_GROUPS]
    chosen = projection.sample(labels, largest)
    points, spread = projection.project(found.vectors[chosen])
    order = {cluster: index for index, cluster in enumerate(largest)}
    groups = np.array([order.get(label, -1) for label in labels[chosen]])
    names = [f"cluster {cluster}" for cluster in largest]
    drawn = f"{len(chosen):,} of {len(labels):,} utterances"
    page.figure(
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
        main = {}
        for index in range(len(names)):
            members = speakers[(groups == index) & (speakers >= 0)]
            if len(members):
                main.setdefault(np.bincount(members).argmax(), index)
        by_speaker = np.array([main.get(speaker, -1) for speaker in speakers])
        told = [f"speaker of {name}" for name in names]
        page.figure(
            "map_speakers",
            figures.embedding_map(points, by_speaker, told),
            f"The same map; in colour, the main speakers of these clusters: "
            f"{len(main)} speakers.",
            "By true speaker: the main speaker of each of these clusters, in "
            "the cluster's colour (the first one's, if it leads several).",
            raster=True,
        )
    if len(chosen) < len(labels):
        drawn += (
            f" (seed {projection.SEED}; up to half from clusters in colour)"
        )
    page.paragraph(
        f"Drawn: {drawn}. Unit length, principal components "
        f"({100 * spread:.0f} % of the variance), then t-SNE: neighbours mean "
        "something, distances between groups do not. The largest clusters "
        "need not be typical ones."
    )


def training(page, results):
    """Loss, held-out error and throughput over the epochs.

    Example
    -------
    >>> from lgl_plugin.report.page import Page
    >>> from lgl_plugin.report.results import Results
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "metrics.jsonl").write_text(
    ...     '{"stage": 1, "phase": "simclr", "epoch": 1, "loss": 4.5}'
    ... )
    >>> page = Page(folder / "report", "Run")
    >>> training(page, Results(folder))
    >>> "training loss per epoch: first 4.5" in page.parts[0]
    True
    """
    page.section("Training and throughput")
    drawings = {
        "throughput": ("utterances_per_second", "utterances per second", 0),
        "loss": ("loss", "training loss", None),
        "pseudo_eer": ("pseudo_eer", "EER of held-out pseudo-trials (%)", 0),
    }
    for name, (key, label, bottom) in drawings.items():
        values = [record.get(key) for record in results.records]
        values = [value for value in values if value is not None]
        if not values:
            continue
        page.figure(
            name,
            figures.epochs(results.records, {key: key}, label, bottom=bottom),
            f"{label} per epoch: first {values[0]:.4g}, last "
            f"{values[-1]:.4g}, lowest {min(values):.4g}, highest "
            f"{max(values):.4g}.",
            f"{label[0].upper()}{label[1:]}, per epoch.",
        )
    rows = []
    phases = {}
    for record in results.records:
        if record.get("epoch") is not None:
            phase = record["stage"], record.get("iteration"), record["phase"]
            phases.setdefault(phase, []).append(record)
    for (stage, iteration, phase), records in phases.items():
        speeds = [r.get("utterances_per_second") or 0 for r in records]
        seconds = sum(record.get("seconds") or 0 for record in records)
        rows.append(
            [
                f"iteration {iteration}, {phase}" if stage == 2 else "Stage I",
                len(records),
                f"{np.median(speeds):,.0f}",
                f"{min(speeds):,.0f}",
                f"{max(speeds):,.0f}",
                f"{seconds / 60:,.1f}",
            ]
        )
    if not rows:
        page.paragraph("No epoch is complete yet.")
        return
    header = ["phase", "epochs", "utt/s, median", "lowest", "highest"]
    page.table("Throughput", [*header, "minutes"], rows)


def configuration(page, results):
    """Every setting.

    Example
    -------
    >>> from lgl_plugin.report.page import Page
    >>> from lgl_plugin.report.results import Results
    >>> from lgl_plugin.runs.state import write_state
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "metrics.jsonl").write_text("")
    >>> settings = {"stage 1": {"lr": 0.1, "batch_size": 8}}
    >>> write_state(folder, {"settings": settings, "done": {}})
    >>> page = Page(folder / "report", "Run")
    >>> configuration(page, Results(folder))
    >>> "<summary>stage 1: 2 settings</summary>" in page.parts[0]
    True
    """
    page.section("Configuration")
    if not results.settings:
        page.paragraph("state.json, which holds the settings, is not there.")
    for stage, settings in results.settings.items():
        rows = list(flatten(settings))
        page.folded_table(f"{stage}: {len(rows)} settings", ["key", "is"], rows)


def environment(page, results):
    """Where the run was made, and by which commands.

    Example
    -------
    >>> from lgl_plugin.report.page import Page
    >>> from lgl_plugin.report.results import Results
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "metrics.jsonl").write_text("")
    >>> (folder / "stage1").mkdir()
    >>> _ = (folder / "stage1" / "env.log").write_text("numpy==2.0")
    >>> page = Page(folder / "report", "Run")
    >>> environment(page, Results(folder))
    >>> "numpy==2.0" in page.parts[-1]
    True
    """
    page.section("Environment")
    starts = results.starts
    if starts:
        told = ("time", "command", "commit", "device", "host")
        page.words(
            "Each start of the run",
            [*told, "versions"],
            [
                [
                    *(str(start.get(name)) for name in told),
                    ", ".join(
                        f"{name} {version}"
                        for name, version in start.get("versions", {}).items()
                    ),
                ]
                for start in starts
            ],
        )
    recorded = results.environment()
    if not recorded:
        page.paragraph("The run left no env.log.")
        return
    page.paragraph(
        "SpeechBrain's env.log lists the packages of the pip that was found "
        "first, which need not be those that Python used."
    )
    page.folded_text("env.log", recorded)


def warnings(page, results):
    """What should make one look twice.

    Example
    -------
    >>> from lgl_plugin.report.page import Page
    >>> from lgl_plugin.report.results import Results
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "metrics.jsonl").write_text(
    ...     '{"stage": 0, "phase": "log-mel statistics", "eer": 25.0}\\n'
    ...     '{"stage": 1, "phase": "after simclr", "eer": 30.0}'
    ... )
    >>> page = Page(folder / "report", "Run")
    >>> warnings(page, Results(folder))
    >>> "30.0 % is above the floor of 25.0 %" in page.parts[0]
    True
    """
    page.section(WARNINGS)
    found = []
    for stage, settings in results.settings.items():
        if settings.get("selection") == "trials":
            found.append(
                f"{stage} chose its epochs by the labelled trial list "
                "(selection: trials): its EER is no measure of learning "
                "without labels."
            )
    found.extend(words for _, words in health.findings(results.records))
    floor = results.rows.get("log-mel statistics", {}).get("eer")
    for name, row in results.rows.items():
        rate = row.get("eer", 0.0)
        if floor is not None and name != "untrained" and rate > floor:
            found.append(
                f"{name}: an EER of {rate:.1f} % is above the floor of "
                f"{floor:.1f} % that log-mel statistics reach without a "
                "network."
            )
    for step, reason in results.failed.items():
        found.append(
            f"{step} failed ({reason}); the same command tries it again."
        )
    for step in results.steps:
        if step not in results.done:
            found.append(f"The run is not finished; next step: {step}.")
            break
    found.extend(f"Could not be made: {line}" for line in page.failures)
    bad = results.bad_files()
    if bad:
        found.append(f"{len(bad):,} utterances could not be used.")
    if found:
        page.bullets(found)
    else:
        page.paragraph("None.")
    if bad:
        summary = f"bad_files.txt ({min(len(bad), SHOWN)} of {len(bad):,})"
        page.folded_table(summary, ["utterance", "reason"], bad[:SHOWN])
    times, last = collections.Counter(), {}
    for log, time, *message in results.log_entries():
        entry = (log, *message)
        times[entry] += 1
        last[entry] = time
    if times:
        latest = sorted(last, key=last.get)[-SHOWN:]
        page.folded_table(
            f"Warnings and errors in the logs ({len(latest)} of {len(times)})",
            ["log", "level", "message", "times", "last"],
            [[*entry, times[entry], last[entry]] for entry in latest],
        )


def _number(row, key, factor, digits):
    """A row's figure for a table, empty where there is none."""
    return f"{factor * row[key]:.{digits}f}" if key in row else ""


SECTIONS = (
    journey,
    gates,
    det,
    clusters,
    embedding_map,
    training,
    configuration,
    environment,
    warnings,
)
