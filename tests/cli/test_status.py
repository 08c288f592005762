"""lgl status: how far a run is, what it shows and what comes next."""

import dataclasses
import json

import pytest
from made_run import make_run

from lgl_plugin.adaptation.verdict import Verdict
from lgl_plugin.cli.main import main
from lgl_plugin.report.overview import overview
from lgl_plugin.report.results import Results
from lgl_plugin.runs.lock import LOCK
from lgl_plugin.runs.provenance import command_of
from lgl_plugin.runs.run import Run


def status(folder, capsys):
    main(["status", str(folder)])
    return capsys.readouterr().out


def test_a_finished_run(tmp_path, capsys):
    printed = status(make_run(tmp_path / "run"), capsys)
    assert "10 of 10 steps are done" in printed
    assert "iter2/gated, epoch 2: loss 2.000" in printed
    assert "iter2/gated: EER 16.00 %" in printed
    assert f"Next: lgl export {tmp_path}/run" in printed


def test_an_interrupted_run_says_how_to_go_on(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    state = json.loads((folder / "state.json").read_text())
    for step in ("iter2/gated", "iter2/classifier"):
        del state["done"][step]
    state["settings"]["stage 2"]["classifier_epochs"] = 12
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "starts.jsonl").write_text('{"command": "lgl train mine"}\n')
    printed = status(folder, capsys)
    assert "8 of 10 steps are done" in printed
    assert "stopped    iter2/classifier" in printed
    assert "epoch 2 of 12" in printed
    assert "to come    iter2/gated" in printed
    assert "Go on with: lgl train mine" in printed


def test_a_ceiling_has_no_rounds_to_come(tmp_path, capsys):
    folder = make_run(tmp_path / "run", rounds=0)
    state = json.loads((folder / "state.json").read_text())
    state["settings"]["stage 2"] = {"n_iterations": 2}
    state["sources"]["ceiling"] = "x"
    command = "python ceiling.py stage2.yaml"
    (folder / "starts.jsonl").write_text(json.dumps({"command": command}))
    for done, line in (
        (2, f"Go on with: {command}"),
        (3, f"Next: lgl export {folder} ceiling"),
    ):
        if done == 3:
            state["done"]["ceiling"] = {}
        (folder / "state.json").write_text(json.dumps(state))
        printed = status(folder, capsys)
        assert f"{done} of 3 steps are done" in printed
        assert printed.splitlines()[-1] == line and "iter" not in printed
    (folder / "export" / "ceiling").mkdir(parents=True)
    (folder / "export" / "ceiling" / "hyperparams.yaml").touch()
    printed = status(folder, capsys)
    assert f"Next: lgl who {folder}/export/ceiling AUDIO OUT" in printed


@pytest.mark.parametrize("begun", [True, False])
def test_a_run_that_has_logged_nothing_yet(begun, tmp_path, capsys):
    """A step is under way, or the audio is being listed."""
    command = "python train_lgl.py stage1.yaml"
    if begun:
        Run(tmp_path, 1, {"manifest": None, "data_folder": ""}).save()
    else:
        (tmp_path / LOCK).touch()
    (tmp_path / "starts.jsonl").write_text(json.dumps({"command": command}))
    printed = status(tmp_path, capsys)
    assert f"0 of {2 * begun} steps are done" in printed
    if not begun:  # or this process holds the lock
        assert f"Go on with: {command}" in printed
    main(["report", str(tmp_path)])
    assert (tmp_path / "report" / "index.html").exists()
    with pytest.raises(SystemExit):
        status(tmp_path / "nowhere", capsys)
    assert "there is no folder" in capsys.readouterr().err


def test_a_run_that_is_being_written(tmp_path, capsys):
    import fcntl

    folder = make_run(tmp_path / "run")
    with open(folder / LOCK, "w") as lock:
        lock.write("process 7 on here")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "Being written by process 7 on here" in status(folder, capsys)
    assert "Being written" not in status(folder, capsys)


def test_warnings_and_a_run_of_stage1_alone(tmp_path, capsys):
    folder = make_run(tmp_path / "run", rounds=0)
    with open(folder / "metrics.jsonl", "a") as metrics:
        record = {"stage": 1, "phase": "simclr", "epoch": 3, "lr": 0.0}
        metrics.write(json.dumps(record) + "\n")
    printed = status(folder, capsys)
    assert "Stage II has not begun" in printed
    assert "Warning: Stage I, epoch 3: the learning rate is 0" in printed
    start = "torchrun --nproc_per_node=2"
    by_own = "Stage I is done. Go on with Stage II by stage2.yaml with "
    by_own += f"--pretrained_encoder={folder}/export/stage1"
    own = tmp_path / "my_stage1.yaml"
    both = tmp_path / "other_stage1.yaml"
    other = tmp_path / "other_stage2.yaml"
    other.touch()
    for command, line in (
        (
            # Without what is a setting of Stage I alone.
            f"{start} train_lgl.py hparams/stage1.yaml --seed=2 "
            "--number_of_epochs 3 --method='!name:a.B {c: 1}'",
            "Stage I is done. Go on with Stage II: "
            f"{start} train_lgl.py hparams/stage2.yaml --seed=2",
        ),
        *(
            # Whose encoder is another, and whose learning rate is of SGD.
            (
                f"{start} train_lgl.py hparams/{name}.yaml --seed=2 --lr 0.3 "
                "--new_encoder='{network: {channels: [8]}}'",
                "Stage I is done. Go on with Stage II: "
                f"{start} train_lgl.py hparams/stage2.yaml --seed=2 "
                f"--pretrained_encoder={folder}/export/stage1",
            )
            for name in ("moco", "vicreg", "dino", "rdino", "sdpn")
        ),
        (
            f"{start} train_lgl.py mine/dino.yaml",
            f"{by_own}, after: {start} train_lgl.py mine/dino.yaml",
        ),
        (
            f"{start} train_lgl.py mine.yaml",
            f"{by_own}, after: {start} train_lgl.py mine.yaml",
        ),
        (f"train_lgl.py {own}", f"{by_own}, after: train_lgl.py {own}"),
        (
            f"train_lgl.py {both}",
            f"Stage I is done. Go on with Stage II: train_lgl.py {other}",
        ),
        (
            f"{start} -m lgl_plugin train mine",
            f"Go on with: {start} -m lgl_plugin train mine",
        ),
    ):
        (folder / "starts.jsonl").write_text(json.dumps({"command": command}))
        assert status(folder, capsys).splitlines()[-1] == line
        *_, shown = overview(Results(folder), [])
        assert f"{shown.reason} {shown.text}" == line


def test_a_run_that_was_moved_goes_on_where_it_is(
    tmp_path, capsys, monkeypatch
):
    """By the command as typed it would begin anew in the old place."""
    folder = make_run(tmp_path / "run", rounds=0)
    start = {"command": "lgl train my --output_folder old --lr=1"}
    start |= {"directory": str(tmp_path), "folder": str(tmp_path / "old")}
    (folder / "starts.jsonl").write_text(json.dumps(start))
    monkeypatch.chdir(tmp_path)
    command = f"lgl train my --lr=1 --output_folder={folder}"
    last = status(folder, capsys).splitlines()[-1]
    assert last == f"Go on with: {command}"
    moved = {"folder": "/before"}
    adapted = {"command": "lgl adapt --train a b --output_folder=c", **moved}
    assert command_of(adapted, folder) == (
        f"lgl adapt --train a b --output_folder={folder}"
    )
    monkeypatch.chdir(folder)  # where the audio's path means something else
    last = status(folder, capsys).splitlines()[-1]
    assert last == f"Go on with: cd {tmp_path} && {command}"


LOG = """\
2026-11-29 19:30:25,900 - lgl_plugin.dataio.prepare - INFO - 24 utterances
2026-11-29 19:30:25,918 - lgl_plugin.utils.errors - DEBUG - The error in full:
Traceback (most recent call last):
  File "sizes.py", line 20, in check_batch
    raise ValueError(
ValueError: 7 bad utterances; the first:
  one: is silent
Repair them.
2026-11-29 19:30:25,924 - filelock - DEBUG - Attempting to release lock 1
"""


def test_the_error_in_which_the_latest_start_ended_is_shown(tmp_path, capsys):
    folder = make_run(tmp_path / "run", rounds=0)
    assert "Failed" not in status(folder, capsys)
    (folder / "stage1" / "log.txt").write_text(LOG)
    printed = status(folder, capsys)
    assert (
        "Failed: 7 bad utterances; the first:\n  one: is silent\nRepair them.\n"
        in printed
    )
    (folder / "stage1" / "log.txt").write_text(
        LOG.replace("The error in full", "Exception").replace(
            "ValueError: 7 bad utterances; the first:", "MemoryError"
        )
    )
    assert "Failed: MemoryError\n" in status(folder, capsys)
    begun = LOG + "2026-11-29 19:31:00,000 - speechbrain.core - INFO - Begin\n"
    (folder / "stage1" / "log.txt").write_text(begun)
    assert "Failed" not in status(folder, capsys)


def test_stage2_goes_on_from_the_positives_of_any_method(tmp_path, capsys):
    folder = make_run(tmp_path / "run", rounds=0)
    state = json.loads((folder / "state.json").read_text())
    state["settings"]["stage 1"]["ssps_epochs"] = 5
    state["done"]["ssps"] = {}
    (folder / "state.json").write_text(json.dumps(state))
    start = {"command": "python train_lgl.py hparams/dino.yaml"}
    (folder / "starts.jsonl").write_text(json.dumps(start))
    last = status(folder, capsys).splitlines()[-1]
    assert last.endswith(f"--pretrained_encoder={folder}/export/ssps")


@pytest.mark.parametrize("judged", [False, True])
def test_more_recordings_go_where_they_are_not_refused(
    judged, tmp_path, capsys, monkeypatch
):
    """Verdicts on some recordings and on more would not be of one encoder."""
    command = "lgl adapt enc audio --train --output_folder"
    run = Run(tmp_path / "run", 0, {"made_from": {}})
    run.done = {"start": {}}
    if judged:
        kept = dataclasses.asdict(Verdict(20, 4.0, 5.0, 0.5, 2.0))
        run.done |= {"centring": kept, "whitening": kept}
    run.failed = {"split" if judged else "centring": "too few"}
    run.save()
    start = {"command": f"{command} {run.folder}"}
    (run.folder / "starts.jsonl").write_text(json.dumps(start))
    monkeypatch.setattr("lgl_plugin.cli.status.writer_of", lambda folder: None)
    last = status(run.folder, capsys).splitlines()[-1]
    if judged:
        into = f"Add recordings, then, into a new folder: {command}=NEW"
        assert last == into
    else:
        assert last == f"Add recordings, then: {command} {run.folder}"


def test_a_folder_without_its_state_is_not_to_be_gone_on_with(tmp_path, capsys):
    """Neither a training nor an export could go on in such a copy."""
    folder = make_run(tmp_path / "run")
    (folder / "state.json").unlink()
    (folder / "starts.jsonl").write_text('{"command": "lgl train mine"}\n')
    said = "It holds no state.json, so that no run can go on here. Begin anew: "
    last = status(folder, capsys).splitlines()[-1]
    assert last == f"{said}lgl train mine --output_folder=NEW"
    (tmp_path / LOCK).touch()
    last = status(tmp_path, capsys).splitlines()[-1]
    assert last == f"{said}lgl train AUDIO --output_folder=NEW"
