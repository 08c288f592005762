"""The page that sets runs side by side."""

import os

from lgl_plugin import figures
from lgl_plugin.metrics import cells
from lgl_plugin.results import flatten

COMPARED = (
    "eer",
    "min_dcf_001",
    "nmi",
    "selected_share",
    "utterances_per_second",
)


def kinds(runs):
    """Runs that differ in their seeds alone are of one kind.

    Arguments
    ---------
    runs : list of Results
        In the order of the page.

    Returns
    -------
    dict
        From a name, the folders of its runs, to a list of these.
    """
    paths = [str(run.folder.resolve()) for run in runs]
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    found = {}
    for run, path in zip(runs, paths):
        names, members = found.setdefault(_without_seed(run), ([], []))
        names.append(os.path.relpath(path, common))
        members.append(run)
    return {", ".join(names): members for names, members in found.values()}


def _without_seed(run):
    """A run's settings less its seed, to be compared."""
    rows = []
    for stage, settings in run.settings.items():
        seed = str(settings.get("seed"))
        for key, value in flatten(settings, f"{stage}: "):
            if key.rpartition(".")[2].rpartition(" ")[2] == "seed":
                continue
            # Paths of another run name its seed, as in results/lgl/<seed>.
            folders = value.split("/")
            if len(folders) > 1:
                folders = ["<seed>" if f == seed else f for f in folders]
            rows.append((key, "/".join(folders)))
    return tuple(rows)


def overview(page, runs):
    """The table: a group of columns for each kind."""
    page.paragraph(
        "Runs that differ in their seeds alone are of one kind: their mean, "
        "and in brackets the lowest and the highest."
    )
    home = page.folder
    own = {run.folder / "report" / "index.html": run for run in runs}
    page.links(
        {
            f"Page of {run.folder}": os.path.relpath(path, home)
            for path, run in own.items()
            if path.exists()
        }
    )
    page.section("Side by side")
    names = list(dict.fromkeys(name for run in runs for name in run.rows))
    header, rows, groups = ["phase"], {name: [name] for name in names}, {}
    for kind, members in kinds(runs).items():
        columns, found = cells([run.rows for run in members], COMPARED)
        header += columns[1:]
        groups[kind] = len(columns) - 1
        found = {name: figures for name, *figures in found}
        for name in names:
            rows[name] += found.get(name, [""] * groups[kind])
    page.table("All phases", header, rows.values(), groups, wide=True)


def journey(page, runs):
    """The journeys in one figure."""
    page.section("Journeys")
    groups = {
        kind: [run.rows for run in members]
        for kind, members in kinds(runs).items()
    }
    page.figure(
        "journey",
        figures.journey(groups),
        "EER and NMI over the phases, a line for each kind of runs; the "
        "figures are in the table above.",
        "EER and NMI over the phases: a kind's mean with markers, its runs as "
        "thin lines.",
    )


def det(page, runs):
    """The last phase of each run that has scores."""
    page.section("Verification errors")
    shown = {}
    for kind, members in kinds(runs).items():
        for name, run in zip(kind.split(", "), members):
            scores = run.scores()
            if scores:
                phase, pair = list(scores.items())[-1]
                shown[f"{name}: {phase}"] = pair
    if not shown:
        page.paragraph("No run has trial scores.")
        return
    page.figure(
        "det",
        figures.det(shown),
        "Detection error trade-off curves of " + "; ".join(shown),
        "Misses against false alarms, the latest scored phase of each run.",
    )


def differences(page, runs):
    """The settings in which the runs differ."""
    page.section("What differs")
    settings = {}
    for kind, members in kinds(runs).items():
        for name, run in zip(kind.split(", "), members):
            settings[name] = {
                key: value
                for stage, part in run.settings.items()
                for key, value in flatten(part, f"{stage}: ")
            }
            settings[name]["steps done"] = f"{len(run.done)}"
    keys = dict.fromkeys(key for each in settings.values() for key in each)
    rows = []
    for key in keys:
        values = [each.get(key, "") for each in settings.values()]
        if len(set(values)) > 1:
            rows.append([key, *values])
    if rows:
        page.words("Settings that differ", ["key", *settings], rows)
    else:
        page.paragraph("The settings are the same.")


SECTIONS = (overview, journey, det, differences)
