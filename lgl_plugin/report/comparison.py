"""The page that sets runs side by side."""

import os

from lgl_plugin.report import figures
from lgl_plugin.runs.metrics_log import cells
from lgl_plugin.runs.settings import flatten

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
    runs : list of lgl_plugin.report.results.Results
        In the order of the page.

    Returns
    -------
    dict
        From a kind's name to its runs, a dict from their folders' names.

    Example
    -------
    >>> from lgl_plugin.report.results import Results
    >>> from lgl_plugin.runs.state import write_state
    >>> tmp, runs = getfixture("tmp_path"), []
    >>> for seed in (1, 2):
    ...     (tmp / str(seed)).mkdir()
    ...     _ = (tmp / f"{seed}/metrics.jsonl").write_text(
    ...         '{"stage": 0, "phase": "untrained", "eer": 38.0}'
    ...     )
    ...     settings = {"stage 1": {"seed": seed, "lr": 0.1}}
    ...     write_state(tmp / str(seed), {"settings": settings, "done": {}})
    ...     runs.append(Results(tmp / str(seed)))
    >>> list(kinds(runs))
    ['1, 2']
    """
    paths = [str(run.folder.resolve()) for run in runs]
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    found = {}
    for run, path in zip(runs, paths):
        members = found.setdefault(_without_seed(run), {})
        members[os.path.relpath(path, common)] = run
    return {", ".join(members): members for members in found.values()}


def _without_seed(run):
    """A run's settings less its seed, to be compared."""
    rows = []
    for stage, settings in run.settings.items():
        seed = str(settings.get("seed"))
        for key, value in flatten(settings, f"{stage}: "):
            if key.endswith((": seed", ".seed")):
                continue
            # Paths of another run name its seed, as in results/lgl/<seed>.
            folders = value.split("/")
            if len(folders) > 1:
                named = (seed, f"seed{seed}")
                folders = ["<seed>" if f in named else f for f in folders]
            rows.append((key, "/".join(folders)))
    return tuple(rows)


def overview(page, runs):
    """The table: a group of columns for each kind.

    Example
    -------
    >>> from lgl_plugin.report.page import Page
    >>> from lgl_plugin.report.results import Results
    >>> tmp = getfixture("tmp_path")
    >>> for seed, eer in ((1, 38.0), (2, 36.0)):
    ...     (tmp / str(seed)).mkdir()
    ...     _ = (tmp / f"{seed}/metrics.jsonl").write_text(
    ...         f'{{"stage": 0, "phase": "untrained", "eer": {eer}}}'
    ...     )
    >>> page = Page(tmp / "report", "Both")
    >>> overview(page, [Results(tmp / "1"), Results(tmp / "2")])
    >>> "<td>37.0\\n(36.0-38.0)</td>" in page.parts[-1]
    True
    """
    page.paragraph(
        "Runs that differ in their seeds alone are of one kind: their mean, "
        "and in brackets the lowest and the highest."
    )
    own = {run.folder / "report" / "index.html": run.folder for run in runs}
    page.links(
        {
            f"Page of {folder}": os.path.relpath(path, page.folder)
            for path, folder in own.items()
            if path.exists()
        }
    )
    page.section("Side by side")
    names = list(dict.fromkeys(name for run in runs for name in run.rows))
    header, rows, groups = ["phase"], {name: [name] for name in names}, {}
    for kind, members in kinds(runs).items():
        members = [run.rows for run in members.values()]
        columns, found = cells(members, COMPARED)
        header += columns[1:]
        groups[kind] = len(columns) - 1
        found = {name: others for name, *others in found}
        for name in names:
            values = found.get(name, [""] * groups[kind])
            rows[name] += [value.replace(" (", "\n(") for value in values]
    page.table("All phases", header, rows.values(), groups, wide=True)


def journey(page, runs):
    """The journeys in one figure.

    Example
    -------
    >>> from lgl_plugin.report.page import Page
    >>> from lgl_plugin.report.results import Results
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "metrics.jsonl").write_text(
    ...     '{"stage": 0, "phase": "untrained", "eer": 38.0}'
    ... )
    >>> page = Page(folder / "comparison", "A run and itself")
    >>> journey(page, [Results(folder)] * 2)
    >>> sorted(path.name for path in page.folder.iterdir())
    ['journey.png', 'journey.svg']
    """
    page.section("Journeys")
    groups = {
        kind: [run.rows for run in members.values()]
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
    """The last phase of each run that has scores.

    Example
    -------
    >>> from lgl_plugin.utils.files import save_arrays
    >>> from lgl_plugin.report.page import Page
    >>> from lgl_plugin.report.results import Results
    >>> folder = getfixture("tmp_path") / "lgl"
    >>> path = folder / "stage1" / "scores.npz"
    >>> save_arrays(path, scores=[0.9, 0.1], labels=[True, False])
    >>> _ = (folder / "metrics.jsonl").write_text(
    ...     '{"stage": 1, "phase": "after simclr", "eer": 0.0}'
    ... )
    >>> page = Page(folder / "comparison", "One run")
    >>> det(page, [Results(folder)])
    >>> "curves of lgl: Stage I" in page.parts[-1]
    True
    """
    page.section("Verification errors")
    shown = {}
    for name, run in _named(runs):
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
    """The settings in which the runs differ.

    Example
    -------
    >>> from lgl_plugin.report.page import Page
    >>> from lgl_plugin.report.results import Results
    >>> from lgl_plugin.runs.state import write_state
    >>> tmp, runs = getfixture("tmp_path"), []
    >>> for lr in (0.1, 0.2):
    ...     folder = tmp / f"lr{lr}"
    ...     folder.mkdir()
    ...     _ = (folder / "metrics.jsonl").write_text("")
    ...     settings = {"stage 1": {"seed": 1, "lr": lr}}
    ...     write_state(folder, {"settings": settings, "done": {}})
    ...     runs.append(Results(folder))
    >>> page = Page(tmp / "report", "Both")
    >>> differences(page, runs)
    >>> "stage 1: lr" in page.parts[-1], "stage 1: seed" in page.parts[-1]
    (True, False)
    """
    page.section("What differs")
    columns = {}
    for name, run in _named(runs):
        columns[name] = {
            key: value
            for stage, settings in run.settings.items()
            for key, value in flatten(settings, f"{stage}: ")
        }
        columns[name]["steps done"] = str(len(run.done))
    keys = dict.fromkeys(key for column in columns.values() for key in column)
    rows = [
        [key, *(column.get(key, "") for column in columns.values())]
        for key in keys
    ]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    if rows:
        page.words("Settings that differ", ["key", *columns], rows)
    else:
        page.paragraph("The settings are the same.")


def _named(runs):
    """(name, run) of each run, kind after kind."""
    for members in kinds(runs).values():
        yield from members.items()


SECTIONS = (overview, journey, det, differences)
