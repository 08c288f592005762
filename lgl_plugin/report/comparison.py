"""The parts of the page that compares runs, as plain data for `page.Page`."""

import os
import pathlib
import re
import urllib.parse
from collections.abc import Iterator

from lgl_plugin.report import figures
from lgl_plugin.report.page import Block, Figure, Links, Table
from lgl_plugin.report.results import Results
from lgl_plugin.runs.differences import flatten, identity
from lgl_plugin.runs.metrics_log import COLUMNS, LABEL_FREE, cells

# Figures from a trial list; runs without one show label-free figures.
SCORED = ("eer", "min_dcf_001", "nmi")
COMPARED = ("selected_share", "utterances_per_second")


def group_by_settings(runs: list[Results]) -> dict[str, dict[str, Results]]:
    """Returns groups of runs that differ only in their seeds, by name.

    A group maps the folders of its runs, relative to the deepest folder that
    all runs share, to the runs. Its name lists these folders.
    """
    paths = [str(run.folder.resolve()) for run in runs]
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    groups = {}
    for run, path in zip(runs, paths):
        members = groups.setdefault(_without_seed(run), {})
        members[os.path.relpath(path, common)] = run
    return {", ".join(members): members for members in groups.values()}


def _settings(run):
    """Returns, by name, the settings that change a run's result."""
    return {
        key: value
        for stage, settings in run.settings.items()
        for key, value in flatten(identity(settings), f"{stage}: ")
    }


def _without_seed(run):
    """Returns settings and inputs of a run without its seed, hashable."""
    settings = {**_settings(run), **dict(flatten(run.inputs))}
    return frozenset(
        item for item in settings.items() if not re.search("[ .]seed$", item[0])
    )


def _named(runs):
    """Returns the runs by name, group after group."""
    groups = group_by_settings(runs).values()
    return {name: run for group in groups for name, run in group.items()}


def overview(runs: list[Results], folder: pathlib.Path) -> Iterator[Block]:
    """Yields the introduction, with links from the page's folder to runs."""
    yield (
        "Runs that differ in their seeds alone are of one kind: their mean, "
        "and in brackets the lowest and the highest."
    )
    links = {}
    for run in runs:
        page = run.folder / "report" / "index.html"
        if page.exists():
            path = os.path.relpath(page, folder).replace(os.sep, "/")
            links[f"Page of {run.folder}"] = urllib.parse.quote(path)
    yield Links(links)


def side_by_side(runs: list[Results]) -> Iterator[Block]:
    """Yields the table: a group of columns for each group of runs."""
    present = {key for run in runs for row in run.rows.values() for key in row}
    quality = SCORED if present & {*SCORED} else LABEL_FREE
    compared = {key: COLUMNS[key] for key in (*quality, *COMPARED)}
    header, rows, groups = ["phase"], {}, {}
    names = dict.fromkeys(name for run in runs for name in run.rows)
    for group, members in group_by_settings(runs).items():
        columns, body = cells([run.rows for run in members.values()], compared)
        header += columns[1:]
        groups[group] = len(columns) - 1
        body = {name: others for name, *others in body}
        for name in names:
            values = body.get(name, [""] * groups[group])
            row = rows.setdefault(name, [name])
            row += [value.replace(" (", "\n(") for value in values]
    rows = [row for row in rows.values() if any(row[1:])]
    yield Table("All phases", header, rows, groups)


def error_rate_by_phase(runs: list[Results]) -> Iterator[Block]:
    """Yields the EER and NMI of all runs in one figure."""
    groups = {
        group: [run.rows for run in members.values()]
        for group, members in group_by_settings(runs).items()
    }
    present = {key for run in runs for row in run.rows.values() for key in row}
    if not present & {"eer", "nmi", "pseudo_eer"}:
        return
    yield Figure(
        "error_rate_by_phase",
        figures.error_rate_by_phase(groups),
        "The error rate over the phases, a line for each kind of runs; the "
        "figures are in the table above.",
        "The error rate and, if known, NMI over the phases: a kind's mean "
        "with markers, its runs as thin lines.",
    )


def det(runs: list[Results]) -> Iterator[Block]:
    """Yields DET curves of the latest scored phase of each run."""
    curves = {}
    for name, run in _named(runs).items():
        for phase in list(run.scored)[-1:]:
            curves[f"{name}: {phase}"] = run.scores(phase)
    if curves:
        yield Figure(
            "det",
            figures.det(curves),
            "Detection error trade-off curves of " + "; ".join(curves),
            "Misses against false alarms, the latest scored phase of each run.",
        )


def differences(runs: list[Results]) -> Iterator[Block]:
    """Yields the settings in which the runs differ."""
    columns = {
        name: {**_settings(run), "steps done": str(len(run.done))}
        for name, run in _named(runs).items()
    }
    keys = dict.fromkeys(key for column in columns.values() for key in column)
    rows = [[key, *(c.get(key, "") for c in columns.values())] for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    if rows:
        yield Table("Settings", ["key", *columns], rows, prose=True)


# The parts of each section, by its title, in the order of the page.
SECTIONS = {
    "Side by side": (side_by_side, error_rate_by_phase, det),
    "Settings that differ": (differences,),
}
