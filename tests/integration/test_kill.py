"""Runs that are killed, or told to stop, and go on; `kill.py` does more."""

import os
import random
import signal
from unittest import mock

import kill  # of tests/
import pytest

from lgl_plugin.runs.metrics_log import read_metrics

# The page takes longer than all else that a run does here.
WITHOUT_PAGE = """
import sys, train_lgl
sys.argv[0] = "train_lgl.py"
train_lgl.try_to_write_report = id
train_lgl.main()
"""


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A folder with a whole run, and what Stage II printed."""
    folder = tmp_path_factory.mktemp("kill")
    with mock.patch.object(kill, "SCRIPT", ["-c", WITHOUT_PAGE]):
        yield folder, kill.make_reference(folder)[1]


def test_killed_run_ends_as_the_whole_one(reference, tmp_path):
    folder, printed = reference
    rng = random.Random(1)
    line = rng.randrange(len(printed) // 3, len(printed))
    wait = rng.uniform(0, kill.LONGEST_WAIT)
    last, differ = kill.survive(folder, tmp_path / "killed", 1, line, wait)
    assert not differ, f"{wait} s after {last}"


def test_told_to_stop_it_writes_a_checkpoint_and_says_how_to_go_on(
    reference, tmp_path
):
    """Twice; then it goes on to its end."""
    folder, _ = reference
    # 13 slow steps an epoch, of which every second writes a checkpoint.
    options = {
        "--batch_size": "2",
        "--crop_seconds": "3.0",
        "--ckpt_interval_steps": "2",
    }
    words = [
        f"{name}={options.get(name, value)}" if value else name
        for name, _, value in (
            word.partition("=")
            for word in kill.command(folder / "corpus", tmp_path / "told", 0)
        )
    ]
    for number in (signal.SIGTERM, signal.SIGINT):
        run = kill.start(words)
        for line in run.stdout:
            if "Saved a checkpoint" in line:
                break
        # As a terminal does: its readers hear of it too.
        os.killpg(run.pid, number)
        rest = run.stdout.read()
        assert run.wait(timeout=60) == 128 + number
        _, rest = rest.split("stopping after this step")
        saved, left = rest.split(f"Stopped by {number.name}")
        assert saved.count("Saved a checkpoint") == 1
        assert "python train_lgl.py hparams/small_stage1.yaml" in left
        assert "Traceback" not in rest
    printed = "\n".join(kill.finish(words))
    assert "Going into epoch 1" in printed  # in its middle
    epochs = [r for r in read_metrics(tmp_path / "told") if "epoch" in r]
    assert [record["epoch"] for record in epochs] == [1, 2]
