"""A run's folder: steps are done once, metrics survive a torn line."""

import json

import pytest
import torch

from lgl_plugin.metrics import read_metrics
from lgl_plugin.run_folder import (
    Run,
    WholeCheckpointer,
    fork,
    load_weights,
    plain_settings,
    read_labels,
    save_weights,
)


def test_step_that_fails_is_not_done(tmp_path):
    run = Run(tmp_path, 1, {})

    def fail(folder):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run.step("stage1", fail)
    done = Run(tmp_path, 1, {}).step("stage1", lambda folder: {"n": 1})
    assert done == {"n": 1}


def test_stages_share_a_folder_with_settings_of_their_own(tmp_path):
    Run(tmp_path, 1, {"lr": 1}).step("stage1", lambda folder: None)
    Run(tmp_path, 2, {"lr": 2}).step("iter1/labels", lambda folder: None)
    assert set(Run(tmp_path, 1, {"lr": 1}).done) == {"stage1", "iter1/labels"}
    with pytest.raises(ValueError, match="lr: was 2, is 3"):
        Run(tmp_path, 2, {"lr": 3})


def test_torn_line_swallows_neither_itself_nor_the_next(tmp_path):
    run = Run(tmp_path, 1, {})
    run.log(stage=1, phase="simclr", epoch=1)
    with open(tmp_path / "metrics.jsonl", "a") as metrics:
        metrics.write('{"stage": 1, "pha')
    run.log(stage=1, phase="simclr", epoch=2)
    assert [r["epoch"] for r in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_logged_as_null(tmp_path, value):
    Run(tmp_path, 1, {}).log(stage=2, phase="gated", tau=value)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["tau"] is None


def test_settings_know_tags_but_no_comments_and_no_folder():
    first = "gate: !new:a.Fixed\n    tau: 1  # why\noutput_folder: x\n"
    second = "output_folder: y\ngate: !new:a.Fixed {tau: 1}\n"
    other = "output_folder: y\ngate: !new:a.Other {tau: 1}\n"
    assert plain_settings(first) == plain_settings(second)
    assert plain_settings(first) != plain_settings(other)
    # Who bears more bad files may go on.
    assert plain_settings(first + "max_bad_share: 1") == plain_settings(first)


def test_weights_of_another_shape_are_refused(tmp_path):
    path = tmp_path / "encoder.ckpt"
    save_weights(torch.nn.Linear(2, 3), path)
    with pytest.raises(ValueError, match="another width"):
        load_weights(torch.nn.Linear(2, 4), path)


def test_loading_runs_no_code(tmp_path):
    """A pickle that would run something is refused, not run."""

    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    torch.save({"weight": Harm()}, tmp_path / "encoder.ckpt")
    with pytest.raises(ValueError, match="does not fit"):
        load_weights(torch.nn.Linear(2, 3), tmp_path / "encoder.ckpt")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("file", ["model.ckpt", "CKPT.yaml"])
def test_resuming_runs_no_code(tmp_path, file):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    checkpointer = WholeCheckpointer(tmp_path, {"model": torch.nn.Linear(2, 3)})
    folder = checkpointer.save_checkpoint().path
    torch.save({"weight": Harm()}, folder / "model.ckpt")
    if file == "CKPT.yaml":
        harm = f"!!python/object/apply:os.mkdir [{tmp_path}/harm]"
        (folder / file).write_text(harm)
    wanted = "Weights only load failed|could not determine a constructor"
    with pytest.raises(Exception, match=wanted):
        checkpointer.recover_if_possible()
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"done": {}}', '{"done": [], "settings": {}}', "[" * 9999]
    + ['{"done": {"../x": {}}, "settings": {}}', '"\udce9"'],
)
def test_damaged_state_is_named(tmp_path, text):
    path = tmp_path / "state.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="state.json is damaged"):
        Run(tmp_path, 1, {})


@pytest.mark.parametrize(
    "text, line",
    [("", 0), ("a.wav,1\n", 1), ("ID,label\na.wav\n", 2)]
    + [(f"ID,label\na.wav,1\nb.wav,{n}\n", 3) for n in ("-1", "x", "9" * 30)]
    + [('ID,label\n"a\nb",1\n', 3), ("ID,label\n" + "a" * 150000, 2)],
)
def test_damaged_labels_are_named(tmp_path, text, line):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"labels.csv, line {line}"):
        read_labels(path)


class Full(torch.nn.Module):
    """A module that finds the disk full, once it has been told."""

    full = False

    def state_dict(self, *args, **kwargs):
        if self.full:
            raise OSError(28, "No space left on device")
        return super().state_dict(*args, **kwargs)


def test_checkpoint_torn_by_a_full_disk_is_never_loaded(tmp_path):
    model, other = torch.nn.Linear(2, 3), Full()
    checkpointer = WholeCheckpointer(tmp_path, {"a": model, "b": other})
    first = checkpointer.save_checkpoint(meta={"loss": 1.0})
    before = model.weight.detach().clone()
    torch.nn.init.zeros_(model.weight)
    other.full = True
    with pytest.raises(OSError, match="make room and start the same"):
        checkpointer.save_and_keep_only(meta={"loss": 0.5})
    other.full = False
    assert [c.path for c in checkpointer.list_checkpoints()] == [first.path]
    checkpointer.recover_if_possible()
    assert torch.equal(model.weight, before)


def test_checkpoint_torn_by_a_kill_is_never_loaded(tmp_path):
    """What a kill leaves is among the unfinished, and the next save's prey."""
    checkpointer = WholeCheckpointer(tmp_path, {"a": torch.nn.Linear(2, 3)})
    left = tmp_path / "unfinished" / "CKPT+torn"
    left.mkdir(parents=True)
    (left / "CKPT.yaml").write_text("end-of-epoch: true\nunixtime: 1\n")
    assert checkpointer.recover_if_possible() is None
    saved = checkpointer.save_checkpoint()
    assert saved.path.parent == tmp_path and not left.exists()
    assert checkpointer.recover_if_possible().path == saved.path


def test_fork_takes_over_steps_and_what_they_logged(tmp_path):
    run = Run(tmp_path / "run", 2, {"gate": "fixed"})
    for phase in ("labels", "classifier", "gated"):
        run.step(f"iter1/{phase}", lambda folder: (folder / "w").touch())
    (run.folder / "manifest.csv").write_text("ID")
    for phase in ("clusters", "classifier", "after classifier", "gated"):
        run.log(stage=2, iteration=1, phase=phase, loss=1.0)
    kept = ["iter1/labels", "iter1/classifier"]
    fork(run.folder, tmp_path / "new", kept)
    new = Run(tmp_path / "new", 2, {"gate": "none"})
    assert list(new.done) == kept
    assert (new.folder / "manifest.csv").read_text() == "ID"
    assert (new.folder / "iter1/classifier/w").exists()
    assert not (new.folder / "iter1/gated").exists()
    logged = (new.folder / "metrics.jsonl").read_text().splitlines()
    phases = [json.loads(line)["phase"] for line in logged]
    assert phases == ["clusters", "classifier", "after classifier"]
    # Again: the new run's own work stays.
    new.step("iter1/gated", lambda folder: {})
    fork(run.folder, tmp_path / "new", kept)
    assert "iter1/gated" in Run(tmp_path / "new", 2, {"gate": "none"}).done


def test_fork_of_what_is_not_done_yet(tmp_path):
    run = Run(tmp_path / "run", 1, {})
    run.step("stage1", lambda folder: {})
    with pytest.raises(ValueError, match="iter1/labels"):
        fork(run.folder, tmp_path / "new", ["stage1", "iter1/labels"])
