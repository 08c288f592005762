"""The table of a run."""

import json

import pytest

from lgl_plugin.runs.metrics_log import read_metrics, summarise, table

RECORDS = [
    {"stage": 0, "phase": "untrained", "eer": 38.0, "threshold": 0.5},
    {"stage": 1, "phase": "simclr", "epoch": 1, "seconds": 60.0, "loss": 4.0},
    {"stage": 1, "phase": "simclr", "epoch": 2, "seconds": 30.0, "loss": 3.0},
    {"stage": 1, "phase": "after simclr", "eer": 25.0, "min_dcf_001": 0.75},
    {
        "stage": 2,
        "iteration": 1,
        "phase": "clusters",
        "nmi": 0.6543,
        "seconds": 6.0,
    },
    {
        "stage": 2,
        "iteration": 1,
        "phase": "classifier",
        "epoch": 1,
        "selected_share": 1.0,
        "tau": None,
        "seconds": 12.0,
    },
    {"stage": 2, "iteration": 1, "phase": "after classifier", "eer": 20.0},
    {
        "stage": 2,
        "iteration": 1,
        "phase": "gated",
        "epoch": 1,
        "selected_share": 0.5,
        "seconds": 18.0,
    },
    {
        "stage": 2,
        "iteration": 1,
        "phase": "after gated",
        "selected_share": 0.625,
        "eer": 15.04,
    },
]


def write(folder, records):
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines)
    return folder


def test_table_by_hand(tmp_path):
    rows = summarise(read_metrics(write(tmp_path / "1", RECORDS)))
    assert table([rows]).splitlines() == [
        "| phase | EER % | minDCF 0.01 | NMI | selected % | minutes |",
        "| --- | --- | --- | --- | --- | --- |",
        "| untrained | 38.0 |  |  |  |  |",
        "| Stage I | 25.0 | 0.750 |  |  | 1.5 |",
        "| iteration 1, classifier | 20.0 |  | 0.654 | 100 | 0.3 |",
        "| iteration 1, gated | 15.0 |  |  | 62 | 0.3 |",
    ]


def test_a_repeated_epoch_counts_once(tmp_path):
    """An interrupted step is done again: its later records are the run's."""
    again = [
        {**RECORDS[1], "seconds": 90.0},
        {**RECORDS[2], "seconds": 90.0},
        {**RECORDS[3], "eer": 24.0},
    ]
    records = read_metrics(write(tmp_path / "1", RECORDS[:3] + again))
    row = summarise(records)["Stage I"]
    assert row == {"seconds": 180.0, "eer": 24.0, "min_dcf_001": 0.75}


def test_several_runs_give_mean_and_range(tmp_path):
    runs = [
        {"Stage I": {"eer": 20.0}, "iteration 1, gated": {"eer": 10.0}},
        {"Stage I": {"eer": 26.0}},
        {"Stage I": {"eer": 23.0}},
    ]
    assert table(runs).splitlines()[2:] == [
        "| Stage I | 23.0 (20.0 to 26.0) |",
        "| iteration 1, gated | 10.0 |",
    ]


@pytest.mark.parametrize(
    "record",
    [
        *([], 3, "text", None, {}, {"stage": 1}, {"stage": [], "phase": "x"}),
        *({"stage": 7, "phase": "x"}, {"stage": 2, "phase": "gated"}),
        {"stage": 1, "phase": "simclr", "eer": "low"},
        {"stage": 1, "phase": "simclr", "iteration": [1]},
        {"stage": 1, "phase": "simclr", "seconds": 10**400},
    ],
)
def test_what_is_no_record_is_named(tmp_path, record):
    lines = [json.dumps(RECORDS[0]), json.dumps(record)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="metrics.jsonl, line 2 is no record"):
        read_metrics(tmp_path)
