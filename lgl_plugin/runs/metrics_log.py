"""Reads a run's metrics.jsonl, and makes a table with a row for each phase."""

import json
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from lgl_plugin.runs.lock import LOCK
from lgl_plugin.runs.state import STATE
from lgl_plugin.utils.tables import markdown_table

METRICS = "metrics.jsonl"  # in the run's folder
# The phase of the baseline, an encoder that is not learnt.
LOG_MEL_STATISTICS = "log-mel statistics"
TRUE_LABELS = "true labels"  # the phase of `ceiling.py`
# Keys of an epoch's record, which no method's figure may be called.
RESERVED = {
    *("stage", "phase", "iteration", "epoch", "loss", "lr", "seconds"),
    *("utterances", "utterances_per_second", "batches", "with_figures"),
    *("skipped", "skipped_steps", "pseudo_eer", "contrastive_accuracy"),
    *("mean_cosine", "effective_dimensions", "alignment", "uniformity"),
    *("silhouette", "agreement", "eer", "min_dcf_001", "min_dcf_005"),
    "threshold",
}
# Figures of a table: their heading, factor and number of decimals.
COLUMNS = {
    "eer": ("EER %", 1.0, 1),
    "eer_backend": ("EER %, back-end", 1.0, 1),
    "eer_as_norm": ("EER %, AS-norm", 1.0, 1),
    "min_dcf_001": ("minDCF 0.01", 1.0, 3),
    "min_dcf_005": ("minDCF 0.05", 1.0, 3),
    "nmi": ("NMI", 1.0, 3),
    "ami": ("AMI", 1.0, 3),
    "pseudo_eer": ("pseudo-EER %", 1.0, 1),
    "mean_cosine": ("mean cosine", 1.0, 2),
    "effective_dimensions": ("dimensions", 1.0, 1),
    "selected_share": ("selected %", 100.0, 0),
    "utterances_per_second": ("utt/s", 1.0, 0),
    "seconds": ("minutes", 1 / 60, 1),
}
# Measured on held-out utterances without labels; shown if there is no EER.
LABEL_FREE = ("pseudo_eer", "mean_cosine", "effective_dimensions")
# Further figures that `summarise` keeps.
FURTHER = (
    "min_dcf_001_backend",
    "min_dcf_001_as_norm",
    "tau",
    "nmi_selected",
    "gate_precision",
    "gate_recall",
    "corrected_share",
    "correction_precision",
    "purity",
    "reliable_share",
)


def read_metrics(run: str | os.PathLike) -> list[dict]:
    """Reads a run's metrics.jsonl.

    Arguments
    ---------
    run : str or os.PathLike
        The run folder.

    Returns
    -------
    list of dict
        The records as they were logged. If an epoch was logged twice, the
        later record counts. A phase that was done again keeps its place. Empty
        if the run has begun but logged nothing.

    Raises
    ------
    FileNotFoundError
        If the folder is not that of a run.
    ValueError
        If a line is valid JSON but no record of a run. An incomplete line is
        skipped.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "metrics.jsonl").write_text(
    ...     '{"stage": 1, "phase": "simclr", "epoch": 1, "loss": 4.5}'
    ... )
    >>> read_metrics(folder)
    [{'stage': 1, 'phase': 'simclr', 'epoch': 1, 'loss': 4.5}]
    """
    path = pathlib.Path(run) / METRICS
    if not path.exists():
        if any(path.with_name(x).exists() for x in (STATE, LOCK)):
            return []
        if not os.path.isdir(run):
            raise FileNotFoundError(f"there is no folder {run}")
        raise FileNotFoundError(
            f"{run} holds no metrics.jsonl: is it the output_folder of a run?"
        )
    records, places = {}, {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            # A crash tore this line; the resumed run logged the epoch again.
            continue
        if not _is_record(record):
            raise ValueError(f"{path}, line {number} is no record of a run")
        key = record_key(record)
        # Popped first: a dict keeps the place of a key that is only replaced.
        records.pop(key, None)
        records[key] = record
        places.setdefault(_phase(record), len(places))
    return sorted(records.values(), key=lambda r: places[_phase(r)])


def record_key(record: dict) -> tuple:
    """Returns the fields that distinguish a record from others of its run."""
    keys = ("stage", "iteration", "phase", "epoch")
    return tuple(record.get(key) for key in keys)


def _phase(record):
    """Returns the stage, iteration and phase of a record."""
    phase = record["phase"].removeprefix("after ")
    return record["stage"], record.get("iteration"), phase


def _is_record(record):
    """Tells whether a JSON value has a record's fields, with finite figures."""
    if not isinstance(record, dict) or record.get("stage") not in (0, 1, 2):
        return False
    iteration = record.get("iteration")
    if type(iteration) is not int and (iteration or record["stage"] == 2):
        return False
    figures = [record.get(k) for k in ("epoch", *COLUMNS, *FURTHER)]
    # JSON integers have no limit: float() of a longer one would overflow.
    return isinstance(record.get("phase"), str) and all(
        figure is None
        or (isinstance(figure, int | float) and abs(figure) < 1e300)
        for figure in figures
    )


def summarise(records: Iterable[dict]) -> dict[str, dict[str, float]]:
    """Joins a run's records into a row for each phase, in their order.

    Arguments
    ---------
    records : iterable of dict
        From `read_metrics`.

    Returns
    -------
    dict
        The figures of each row, by the row's name. Seconds are summed; of any
        other figure the last value counts.

    Example
    -------
    >>> summarise([{"stage": 1, "phase": "after simclr", "eer": 20.31}])
    {'Stage I': {'eer': 20.31}}
    """
    rows = {}
    for record in records:
        row = rows.setdefault(row_name(record), {})
        for key in (*COLUMNS, *FURTHER):
            if key == "seconds" and record.get(key) is not None:
                row[key] = record[key] + row.get(key, 0.0)
            elif record.get(key) is not None:
                row[key] = record[key]
    return rows


def row_name(record: dict) -> str:
    """Returns the name of a record's row in tables."""
    phase = record["phase"].removeprefix("after ")
    if record["stage"] == 0:
        return phase
    if record["stage"] == 1:
        return "Stage I, SSPS" if phase == "ssps" else "Stage I"
    # The clusters are the classes that the classifier is trained on.
    phase = "classifier" if phase == "clusters" else phase
    return f"iteration {record['iteration']}, {phase}"


def table(runs: list[dict]) -> str:
    """Makes a Markdown table of one or more runs.

    Arguments
    ---------
    runs : list of dict
        From `summarise`. Of several, mean and range are shown.

    Returns
    -------
    str
        Label-free figures are left out where there is an EER.

    Example
    -------
    >>> print(table([{"Stage I": {"eer": 20.31}}]))
    | phase | EER % |
    | --- | --- |
    | Stage I | 20.3 |
    """
    return markdown_table(*cells(runs, columns(runs)))


def columns(runs: list[dict]) -> dict[str, tuple[str, float, int]]:
    """Returns `COLUMNS`, without label-free figures where there is an EER."""
    scored = any("eer" in row for run in runs for row in run.values())
    left_out = LABEL_FREE if scored else ()
    return {key: COLUMNS[key] for key in COLUMNS if key not in left_out}


def cells(
    runs: list[dict], wanted: dict[str, tuple[str, float, int]] = COLUMNS
) -> tuple[list[str], list[list[str]]]:
    """Returns a table's header and rows: mean and range over the runs.

    `wanted` maps figures to heading, factor and number of decimals. Columns
    and phases without a figure are left out.
    """
    present = {key for run in runs for row in run.values() for key in row}
    used = {key: column for key, column in wanted.items() if key in present}
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run):
        row = [name]
        for key, (_, factor, digits) in used.items():
            values = [
                run[name][key] for run in runs if key in run.get(name, {})
            ]
            row.append(mean_and_range(factor * np.array(values), digits))
        if any(row[1:]):
            rows.append(row)
    return ["phase", *(heading for heading, *_ in used.values())], rows


def mean_and_range(values: Sequence[float] | np.ndarray, digits: int) -> str:
    """Returns the mean as text, and the range if there are several values."""
    if not len(values):
        return ""
    shown = np.mean(values), min(values), max(values)
    # Adding zero turns -0.0 into 0.0.
    mean, low, high = (f"{round(x, digits) + 0.0:,.{digits}f}" for x in shown)
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


# Figures of the line about an epoch, by `training.fit.epoch_line` and
# `lgl status`.
FIGURES = {
    "loss": "loss {:.3f}",
    "accuracy": "accuracy {:.3f}",
    "lr": "lr {:.2g}",
    "selected_share": "selected {:.0%}",
    "pseudo_eer": "pseudo-EER {:.1f} %",
    "mean_cosine": "cosine of strangers {:.2f}",
    "effective_dimensions": "effective dimensions {:.1f}",
    "utterances_per_second": "{:.0f} utterances/s",
}


def figures_text(record: dict, names: Iterable[str] = FIGURES) -> list[str]:
    """Returns an epoch's figures in words, those of `names` that it has."""
    return [
        FIGURES[name].format(record[name])
        for name in names
        if record.get(name) is not None
    ]
