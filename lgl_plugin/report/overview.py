"""The top of a run's page: verdict, main figures and next command."""

from collections.abc import Iterator

import numpy as np

from lgl_plugin.report.page import Block, Command, Summary
from lgl_plugin.report.results import Results
from lgl_plugin.runs.metrics_log import COLUMNS, LABEL_FREE, LOG_MEL_STATISTICS
from lgl_plugin.training import health


def overview(results: Results, failures: list[str]) -> Iterator[Block]:
    """Yields the verdict and its reasons, the main figures, the next command.

    `failures` names the page's parts that could not be made.
    """
    doubts = [*_doubts(results)]
    doubts += [f"Could not be made: {line}" for line in failures]
    done = [step for step in results.steps if step in results.done]
    verdict = "Healthy: no check finds anything wrong."
    if doubts:
        verdict = f"Look at what follows: {len(doubts)} in all."
    if results.left:
        verdict = f"Not finished, next step: {results.left[0]}. {verdict}"
    yield Summary(not doubts, verdict)
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
    reason, command = results.next_command()
    yield Command(f"{reason}:", command)


def _quality(results):
    """Returns the latest EER and its difference to the baseline's, if any.

    Label-free figures follow.
    """
    facts, rows = {}, results.rows
    rates = {name: row["eer"] for name, row in rows.items() if "eer" in row}
    if rates:
        name, rate = list(rates.items())[-1]
        facts[f"EER, {name} (95 %)"] = f"{rate:.1f} %{interval(results, name)}"
        key, under = _same_backend(rows[name], rows.get(LOG_MEL_STATISTICS, {}))
        baseline = rows.get(LOG_MEL_STATISTICS, {})
        base = baseline.get(key, rows[name][key])
        gap = base - rows[name][key]
        if gap:
            side = "below" if gap > 0 else "above"
            title = f"{side} the {base:.1f} % of {LOG_MEL_STATISTICS}{under}"
            facts[title] = f"{abs(gap):.1f} points"
    for key in LABEL_FREE:
        heading, factor, digits = COLUMNS[key]
        values = [row[key] for row in rows.values() if key in row]
        if values:
            value = f"{factor * values[-1]:.{digits}f}"
            facts[f"{heading}, held out"] = value
    return facts


def _same_backend(row, baseline):
    """Returns the figure to compare a row with the baseline by, and its words.

    The baseline's embeddings are whitened. So a network is compared after its
    back-end if it has one: its bare cosine would be at a disadvantage.
    """
    if "eer_backend" in row.keys() & baseline.keys():
        return "eer_backend", ", both under the back-end"
    return "eer", ""


def _doubts(results):
    """Yields sentences about settings, figures and steps that look wrong."""
    for _, warning in health.findings(results.records):
        yield warning
    baseline = results.rows.get(LOG_MEL_STATISTICS, {})
    for name, row in results.rows.items():
        key, under = _same_backend(row, baseline)
        rate, base = row.get(key, 0.0), baseline.get(key, np.inf)
        if name != "untrained" and rate > base:
            yield (
                f"{name}: an EER of {rate:.1f} % is above the {base:.1f} % "
                f"that log-mel statistics reach without a network{under}."
            )
    for step, reason in results.failed.items():
        yield f"{step} failed ({reason}); the same command tries it again."


def interval(results: Results, phase: str) -> str:
    """Returns the interval of a phase's EER in brackets, "" without one."""
    ends = results.intervals.get(phase)
    return " ({:.1f}-{:.1f})".format(*ends) if ends else ""
