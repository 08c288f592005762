"""A run's metrics.jsonl: read, joined into a row a phase, as a table."""

import json
import pathlib

import numpy as np

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
# What else `summarise` keeps of the records.
FURTHER = (
    "tau",
    "nmi_selected",
    "gate_precision",
    "gate_recall",
    "corrected_share",
    "correction_precision",
    "purity",
    "reliable_share",
)


def read_metrics(run):
    """Reads a run's metrics.jsonl.

    Arguments
    ---------
    run : str or pathlib.Path
        The run folder.

    Returns
    -------
    list of dict
        The records as they were logged; of one epoch logged twice, the later.
        A phase that was done again stays where it was.

    Raises
    ------
    FileNotFoundError
        If there are no metrics in that folder.
    ValueError
        If a line is no record of a run's; one that was torn is left out.

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
    records, places = {}, {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue  # torn by a crash; the epoch was logged again after it
        if not _is_record(record):
            raise ValueError(f"{path}, line {number} is no record of a run")
        key = key_of(record)
        records.pop(key, None)  # its place is where it was logged last
        records[key] = record
        places.setdefault(_phase(record), len(places))
    return sorted(records.values(), key=lambda r: places[_phase(r)])


def key_of(record):
    """What tells a record from all others of its run.

    Example
    -------
    >>> key_of({"stage": 1, "phase": "simclr", "epoch": 2, "loss": 4.0})
    (1, None, 'simclr', 2)
    """
    keys = ("stage", "iteration", "phase", "epoch")
    return tuple(record.get(key) for key in keys)


def _phase(record):
    """What keeps its place among the others when it is done again."""
    phase = record["phase"].removeprefix("after ")
    return record["stage"], record.get("iteration"), phase


def _is_record(record):
    """Whether an object says when it was logged, and its figures are some."""
    if not isinstance(record, dict) or record.get("stage") not in (0, 1, 2):
        return False
    if record["stage"] == 2 and type(record.get("iteration")) is not int:
        return False
    figures = [record.get(k) for k in ("epoch", *COLUMNS, *FURTHER)]
    return isinstance(record.get("phase"), str) and all(
        figure is None
        or (isinstance(figure, int | float) and abs(figure) < 1e300)
        for figure in figures
    )


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
        for key in (*COLUMNS, *FURTHER):
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
    header, rows = cells(runs)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(runs, columns=tuple(COLUMNS)):
    """The table's cells: mean, lowest and highest over the runs.

    Arguments
    ---------
    runs : list of dict
        From `summarise`, one for each run.
    columns : iterable of str
        Those of `COLUMNS` that are wanted; those that are empty are left out.

    Returns
    -------
    (list of str, list of list of str)
        The header and the rows.

    Example
    -------
    >>> cells([{"untrained": {"eer": 38.0, "seconds": 60.0}}], ["seconds"])
    (['phase', 'minutes'], [['untrained', '1.0']])
    """
    present = {key for run in runs for row in run.values() for key in row}
    used = [column for column in columns if column in present]
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run):
        row = [name]
        for column in used:
            _, factor, digits = COLUMNS[column]
            values = [
                factor * run[name][column]
                for run in runs
                if column in run.get(name, {})
            ]
            row.append(_cell(values, digits))
        rows.append(row)
    return ["phase", *(COLUMNS[column][0] for column in used)], rows


def _cell(values, digits):
    """Mean, and the range when there are several values."""
    if not values:
        return ""
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f}-{max(values):.{digits}f})"
