"""Checkpoints: whole or absent, and checked before they are loaded."""

import errno
import os
import shutil

import pytest
import torch
from speechbrain.utils.checkpoints import Checkpointer

from lgl_plugin.runs import checkpoints
from lgl_plugin.runs.checkpoints import WholeCheckpointer, hooks_without


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
    with pytest.raises(
        OSError, match="The one before it is whole: make room.*start the same"
    ):
        checkpointer.save_and_keep_only(meta={"loss": 0.5})
    other.full = False
    assert [c.path for c in checkpointer.list_checkpoints()] == [first.path]
    checkpointer.recover_if_possible()
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("silent", [False, True])
def test_a_checkpoint_that_cannot_be_moved_says_so(
    tmp_path, monkeypatch, silent
):
    """Even on a disk that does not say how much room there is."""
    checkpointer = WholeCheckpointer(tmp_path, {"a": torch.nn.Linear(2, 3)})

    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    if silent:
        monkeypatch.setattr(shutil, "disk_usage", refuse)
    with pytest.raises(
        OSError, match="Read-only.* none before it.*folder writable, and"
    ) as e:
        checkpointer.save_checkpoint()
    assert ("MB are free" in str(e.value)) != silent
    assert not (tmp_path / "unfinished").exists()


@pytest.mark.parametrize(
    "kind, grows", [(WholeCheckpointer, False), (Checkpointer, True)]
)
def test_a_later_save_reads_no_more_than_the_first(kind, grows, tmp_path):
    """As SpeechBrain's does, from call to call."""
    checkpointer = kind(tmp_path, {"a": torch.nn.Linear(2, 3)})
    whole, reads, counts = checkpointer.list_checkpoints, [], []
    checkpointer.list_checkpoints = lambda: reads.append(1) or whole()
    for _ in range(3):
        reads.clear()
        checkpointer.save_and_keep_only()
        counts.append(len(reads))
    assert counts[0] > 0 and (counts[0] < counts[2]) == grows


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


@pytest.mark.parametrize("name", ["a.ckpt", "CKPT.yaml", "checksums.json"])
@pytest.mark.parametrize("harm", ["truncate", "flip"])
def test_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path, caplog, name, harm
):
    model = torch.nn.Linear(2, 3)
    checkpointer = WholeCheckpointer(tmp_path, {"a": model})
    first = checkpointer.save_checkpoint()
    before = model.weight.detach().clone()
    torch.nn.init.zeros_(model.weight)
    second = checkpointer.save_checkpoint()
    path = second.path / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    end = len(content) if harm == "flip" else len(content) // 2
    path.write_bytes(content[:end])
    again = WholeCheckpointer(tmp_path, {"a": model})
    assert again.recover_if_possible().path == first.path
    assert torch.equal(model.weight, before)
    assert str(second.path) in caplog.text and name in caplog.text


@pytest.mark.parametrize("text", ['{"a.ckpt": 5}', '{"a.ckpt": {}}', "[]"])
def test_checksums_that_are_others_are_damage(tmp_path, text, caplog):
    model = torch.nn.Linear(2, 3)
    saved = WholeCheckpointer(tmp_path, {"a": model}).save_checkpoint()
    (saved.path / "checksums.json").write_text(text)
    assert WholeCheckpointer(tmp_path, {"a": model}).list_checkpoints() == []
    assert "checksums.json has been altered" in caplog.text


def test_checkpoint_that_the_disk_cannot_read_gives_way(
    tmp_path, caplog, monkeypatch
):
    model = torch.nn.Linear(2, 3)
    WholeCheckpointer(tmp_path, {"a": model}).save_checkpoint()

    def unreadable(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoints, "damage", unreadable)
    assert WholeCheckpointer(tmp_path, {"a": model}).list_checkpoints() == []
    assert "Input/output error" in caplog.text


def test_checkpoint_without_checksums_is_not_used(tmp_path):
    """Nothing tells whether its files are whole."""
    model = torch.nn.Linear(2, 3)
    saved = WholeCheckpointer(tmp_path, {"a": model}).save_checkpoint()
    (saved.path / "checksums.json").unlink()
    again = WholeCheckpointer(tmp_path, {"a": model})
    assert again.recover_if_possible() is None


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


def test_a_clock_that_was_put_back_changes_no_order(tmp_path, monkeypatch):
    model = torch.nn.Linear(1, 1)
    checkpointer = WholeCheckpointer(tmp_path, {"a": model})
    checkpointer.save_checkpoint()
    monkeypatch.setattr(checkpoints.time, "time", lambda: 1e9)  # 2001
    later = checkpointer.save_checkpoint()
    assert checkpointer.find_checkpoint().path == later.path
    latest = checkpointer.save_checkpoint(meta={"loss": 1.0})
    assert checkpointer.find_checkpoint().path == latest.path
    again = WholeCheckpointer(tmp_path, {"a": model})
    assert again.find_checkpoint().path == latest.path


def test_frozen_weights_are_left_out(tmp_path):
    """The module has them; of an older, whole checkpoint all are taken."""

    def pair():
        return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 4))

    def checkpointer(module, *frozen):
        made = WholeCheckpointer(tmp_path)
        save, load = hooks_without(frozen, module)
        made.add_recoverable("model", module, load, save)
        return made

    before, after, frozen = pair(), pair(), ("0.weight", "0.bias")
    saved = checkpointer(before, *frozen).save_checkpoint()
    kept = torch.load(saved.path / "model.ckpt", weights_only=True)
    assert kept.keys() == {"1.weight", "1.bias"}
    with pytest.raises(ValueError, match="frozen weights are others"):
        checkpointer(after, *frozen).recover_if_possible()
    after[0].load_state_dict(before[0].state_dict())
    checkpointer(after, *frozen).recover_if_possible()
    assert torch.equal(after[1].weight, before[1].weight)
    WholeCheckpointer(tmp_path, {"model": before}).save_checkpoint()
    after = pair()
    checkpointer(after, *frozen).recover_if_possible()
    assert torch.equal(after[0].weight, before[0].weight)
