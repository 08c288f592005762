"""Runs that are killed, or told to stop, and go on; `kill.py` does more."""

import os
import random
import shutil
import signal

import kill  # of tests/
import pytest


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A folder with a whole run, and what Stage II printed."""
    folder = tmp_path_factory.mktemp("kill")
    return folder, kill.make_reference(folder)[1]


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_run_ends_as_the_whole_one(reference, tmp_path, seed):
    folder, printed = reference
    rng = random.Random(seed)
    line = rng.randrange(len(printed) // 3, len(printed))
    wait = rng.uniform(0, kill.LONGEST_WAIT)
    last, differ = kill.survive(folder, tmp_path / "killed", 1, line, wait)
    assert not differ, f"{wait} s after {last}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_writes_a_checkpoint_and_says_how_to_go_on(
    reference, tmp_path, number
):
    folder, _ = reference
    output = tmp_path / "told"
    words = kill.command(folder / "corpus", output, 0)
    run = kill.start(words)
    for line in run.stdout:
        if "Going into epoch 2" in line:
            break
    # As a terminal does: its readers hear of it too.
    os.killpg(run.pid, number)
    rest = run.stdout.read()
    assert run.wait(timeout=60) == 128 + number
    assert f"Stopped by {number.name}" in rest
    assert f"python train_lgl.py hparams/{words[2].split('/')[1]}" in rest
    assert "Traceback" not in rest
    assert any((output / "stage1" / "checkpoints").glob("CKPT*"))
    kill.finish(words)
    whole = kill.outcome(folder / "stage1")
    assert not kill.differences(whole, kill.outcome(output))
    shutil.rmtree(output)
