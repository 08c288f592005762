"""lgl train against the recipe's two commands, and its resumption."""

import json
import subprocess
import sys

from tiny import STAGE1, STAGE2, TINY

from lgl_plugin.runs.metrics_log import read_metrics

# What tells of the clock and not of the run.
TIMES = ("seconds", "utterances_per_second")


def lgl_train(corpus, output, *options):
    """Runs the command as a user does; its status and what it printed."""
    options = [
        *(*TINY, *STAGE1, *STAGE2, f"--data_folder={corpus}"),
        f"--verification_file={corpus}/trials.txt",
        *("--speaker_folder=True", *options),
    ]
    options = {option.split("=")[0]: option for option in options}.values()
    done = subprocess.run(
        [sys.executable, "-m", "lgl_plugin", "train", f"{corpus}/wav"]
        + [f"--output_folder={output}", "--preset=small", *options],
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


def figures(folder):
    """A run's records without times."""
    return [
        {key: value for key, value in record.items() if key not in TIMES}
        for record in read_metrics(folder)
    ]


def test_one_job_is_the_two_commands(run, corpus, tmp_path):
    """Bit for bit; and the same command again trains nothing."""
    status, printed = lgl_train(corpus, tmp_path / "run")
    assert status == 0, printed[-3000:]
    assert figures(tmp_path / "run") == figures(run)
    for line in (
        "step 1 of 13: baselines",
        "stage1: epoch 1 of 2, loss ",
        "step 13 of 13: export/iter2",
    ):
        assert printed.count(line) == 1
    assert "%|" not in printed  # no bar, as --noprogressbar asks
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    status, printed = lgl_train(corpus, tmp_path / "run")
    assert status == 0, printed[-3000:]
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_an_error_of_stage2_comes_before_stage1(corpus, tmp_path):
    status, printed = lgl_train(corpus, tmp_path / "run", "--n_redo=0")
    assert status == 2 and "Traceback" not in printed
    assert not (tmp_path / "run").exists()


def test_an_error_behind_the_preparation_is_a_message(corpus, tmp_path):
    status, printed = lgl_train(corpus, tmp_path, "--batch_size=4000")
    assert status == 2 and "Traceback" not in printed
    assert "Lower batch_size" in printed
    choices = json.loads((tmp_path / "train.json").read_text())
    assert choices["preset"] == "small"
