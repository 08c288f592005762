"""What a run achieved: one table, one figure, from metrics.jsonl.

> python -m lgl_plugin.report results/lgl/1
> python -m lgl_plugin.report results/lgl/1 results/lgl/2 results/lgl/3

Several runs of one kind give mean and spread (lowest to highest). The first
run's folder gets the figure, `report/journey.png`.
"""

import argparse
import json
import pathlib
import sys

import numpy as np

from lgl_plugin.files import atomic_write

COLUMNS = {
    "eer": ("EER %", 1.0, 1),
    "min_dcf_001": ("minDCF 0.01", 1.0, 3),
    "min_dcf_005": ("minDCF 0.05", 1.0, 3),
    "nmi": ("NMI", 1.0, 3),
    "ami": ("AMI", 1.0, 3),
    "selected_share": ("selected %", 100.0, 0),
    "utterances_per_second": ("utt/s", 1.0, 0),
    "seconds": ("minutes", 1 / 60, 1),
}


# Rows of the table that are no phase of the pipeline.
ASIDE = ("log-mel statistics", "true labels")


def read_metrics(run):
    """Reads a run's metrics.jsonl.

    Arguments
    ---------
    run : str or pathlib.Path
        The run folder.

    Returns
    -------
    list of dict
        The records; of one epoch logged twice, the later.

    Raises
    ------
    FileNotFoundError
        If there are no metrics in that folder.

    Example
    -------
    >>> read_metrics("nowhere")
    Traceback (most recent call last):
    FileNotFoundError: nowhere holds no metrics.jsonl: is it the \
output_folder of a run?
    """
    path = pathlib.Path(run) / "metrics.jsonl"
    if not path.exists():
        raise FileNotFoundError(
            f"{run} holds no metrics.jsonl: is it the output_folder of a run?"
        )
    records = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # torn by a crash; the epoch was logged again after it
        key = [record.get(k) for k in ("stage", "iteration", "phase", "epoch")]
        records[tuple(key)] = record
    return list(records.values())


def summarise(records):
    """Joins a run's records into a row for each phase.

    Arguments
    ---------
    records : list of dict
        From `read_metrics`.

    Returns
    -------
    dict
        From the row's name to its figures, in the order of the run.

    Example
    -------
    >>> summarise(
    ...     [
    ...         {
    ...             "stage": 1,
    ...             "phase": "simclr",
    ...             "epoch": 1,
    ...             "seconds": 60.0,
    ...             "utterances_per_second": 50.0,
    ...         },
    ...         {"stage": 1, "phase": "after simclr", "eer": 20.0},
    ...     ]
    ... )
    {'Stage I': {'utterances_per_second': 50.0, 'seconds': 60.0, 'eer': 20.0}}
    """
    rows = {}
    for record in records:
        phase = record["phase"].removeprefix("after ")
        if record["stage"] == 0:
            name = phase
        elif record["stage"] == 1:
            name = "Stage I"
        else:
            # The clusters are those that the classifier is trained on.
            phase = "classifier" if phase == "clusters" else phase
            name = f"iteration {record['iteration']}, {phase}"
        row = rows.setdefault(name, {})
        for key in COLUMNS:
            if record.get(key) is None:
                continue
            total = record[key]
            if key == "seconds":
                total += row.get(key, 0.0)
            row[key] = total
    return rows


def table(runs):
    """A Markdown table over one or more runs.

    Arguments
    ---------
    runs : list of dict
        From `summarise`, one for each run.

    Returns
    -------
    str

    Example
    -------
    >>> print(table([{"untrained": {"eer": 38.0}}, {"untrained": {"eer": 40}}]))
    | phase | EER % |
    | --- | --- |
    | untrained | 39.0 (38.0-40.0) |
    """
    names = list(dict.fromkeys(name for run in runs for name in run))
    present = {key for run in runs for row in run.values() for key in row}
    used = [column for column in COLUMNS if column in present]
    lines = [["phase", *(COLUMNS[column][0] for column in used)]]
    lines.append(["---"] * len(lines[0]))
    for name in names:
        cells = [name]
        for column in used:
            _, factor, digits = COLUMNS[column]
            values = [
                factor * run[name][column]
                for run in runs
                if column in run.get(name, {})
            ]
            cells.append(_cell(values, digits))
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(values, digits):
    """Mean, and the range when there are several values."""
    if not values:
        return ""
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def journey(runs, path):
    """Draws EER and NMI over the phases, one line per run.

    What does not take part in the journey, such as the log-mel floor, is a
    dashed line across it.

    Arguments
    ---------
    runs : dict
        From a run's name to what `summarise` gave.
    path : str or pathlib.Path
        The PNG to write.

    Example
    -------
    >>> path = getfixture("tmp_path") / "report" / "journey.png"
    >>> journey({"1": {"untrained": {"eer": 38.0}}}, path)
    >>> path.exists()
    True
    """
    from matplotlib.figure import Figure

    known = list(dict.fromkeys(name for run in runs.values() for name in run))
    names = [name for name in known if name not in ASIDE]
    figure = Figure(figsize=(4 + 0.6 * len(names), 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for run, rows in runs.items():
        for axes, key in ((above, "eer"), (below, "nmi")):
            shown = [name for name in names if key in rows.get(name, {})]
            axes.plot(
                [names.index(name) for name in shown],
                [rows[name][key] for name in shown],
                marker="o",
                label=run,
            )
    for name in ASIDE:
        rows = [run.get(name, {}) for run in runs.values()]
        values = [row["eer"] for row in rows if "eer" in row]
        if not values:
            continue
        above.axhline(np.mean(values), color="gray", ls="--", label=name)
    above.set_ylabel("EER (%)")
    above.legend(title="run")
    below.set_ylabel("NMI of pseudo-labels")
    below.set_xticks(range(len(names)), names, rotation=45, ha="right")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    with atomic_write(path, "wb") as out:
        figure.savefig(out, dpi=120, format="png")


def main(arguments):
    """Prints the table of the runs named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="+", help="output_folder of a run")
    runs = parser.parse_args(arguments).run
    summaries = {run: summarise(read_metrics(run)) for run in runs}
    print(table(list(summaries.values())))
    picture = pathlib.Path(runs[0]) / "report" / "journey.png"
    journey(summaries, picture)
    print(f"\nFigure: {picture}")


if __name__ == "__main__":
    main(sys.argv[1:])
