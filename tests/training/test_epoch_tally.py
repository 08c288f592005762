"""Counts of an epoch: added up, saved, joined over processes. Without a Brain;
in one, test_brain.py kills it at any step."""

import datetime
import math
import os
import pathlib
import signal
import time
import types

import numpy as np
import pytest
import torch
from pretended_device import NothingReadByTheHost
from speechbrain.utils.checkpoints import Checkpointer

from lgl_plugin.nnet.batch_norm import share_statistics
from lgl_plugin.runs.checkpoints import WholeCheckpointer
from lgl_plugin.training import epoch_tally
from lgl_plugin.training.brain import SpeakerBrain
from lgl_plugin.training.epoch_tally import EpochTally
from lgl_plugin.training.nonfinite import NonFiniteGuard
from lgl_plugin.training.start import _keep_start
from lgl_plugin.utils.distributed import from_main
from lgl_plugin.utils.signals import Stop


def counted():
    """A tally of two steps."""
    tally = EpochTally("cpu")
    for step, loss in enumerate((3.0, 5.0), 1):
        tally.add(utterances=6, skipped=torch.tensor(1.0))
        tally.seen.append((torch.arange(3) + step, torch.full((3,), loss)))
        tally.update_average(torch.tensor(loss), step, 0.0)
    return tally


def recovered(tally, folder, end_of_epoch):
    """Another process's tally, from a checkpoint of the first one's."""
    tally.freeze(end_of_epoch)
    Checkpointer(folder, {"epoch": tally}).save_checkpoint(
        end_of_epoch=end_of_epoch
    )
    again = EpochTally("cpu")
    Checkpointer(folder, {"epoch": again}).recover_if_possible()
    return again


def test_counts_add_up():
    tally = counted()
    assert tally.counts == {"utterances": 12, "skipped": 2}
    assert tally.total() == tally.counts
    assert tally.mean_loss() == 4.0
    first, second = tally.join_seen()
    assert first.tolist() == [1, 2, 3, 2, 3, 4]
    assert second.tolist() == 3 * [3.0] + 3 * [5.0]


def test_an_epoch_begins_with_nothing():
    tally = counted()
    tally.last = {"tau": 1.0}
    tally.start()
    assert not tally.counts and not tally.seen and tally.average is None
    assert tally.seconds < 60
    assert tally.join_seen() == []
    assert tally.last == {"tau": 1.0}  # until the next whole epoch


def test_mean_leaves_out_losses_that_are_not_finite():
    """Such a step weighs like one with the mean so far."""
    tally = EpochTally("cpu")
    losses = [2.0, math.nan, 5.0, math.inf, -math.inf, 1.0]
    expected = 0.0
    for step, loss in enumerate(losses, 1):
        tally.update_average(torch.tensor(loss), step, 0.0)
        if math.isfinite(loss):
            expected += (loss - expected) / step
    assert tally.mean_loss() == pytest.approx(expected)


def test_mean_goes_on_from_the_one_before():
    tally = EpochTally("cpu")
    tally.update_average(torch.tensor(9.0), 4, 5.0)
    assert tally.mean_loss() == 6.0  # of 5, 5, 5 and 9


def test_no_step_reads_from_the_device():
    with NothingReadByTheHost():
        tally = counted()
    assert float(tally.average) == 4.0


def test_an_interrupted_epoch_goes_on(tmp_path):
    again = recovered(counted(), tmp_path, end_of_epoch=False)
    again.start()
    assert again.total() == {"utterances": 12, "skipped": 2}
    first, second = counted().join_seen()
    again.seen.append((torch.tensor([9]), torch.tensor([9.0])))
    assert [part.tolist() for part in again.join_seen()] == [
        [*first.tolist(), 9],
        [*second.tolist(), 9.0],
    ]
    again.start()  # the next epoch begins anew
    assert not again.counts and not again.seen


def test_an_epoch_with_nothing_seen_goes_on(tmp_path):
    """Stage I puts nothing by."""
    tally = EpochTally("cpu")
    tally.add(utterances=6)
    again = recovered(tally, tmp_path, end_of_epoch=False)
    again.start()
    assert again.seen == [] and again.counts == {"utterances": 6}


def test_time_leaves_out_the_interruption(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    tally = counted()
    now[0] += 30
    again = recovered(tally, tmp_path, end_of_epoch=False)
    now[0] += 1000
    again.start()
    now[0] += 5
    assert again.seconds == 35


@pytest.mark.parametrize("end_of_epoch", [True, False])
def test_what_a_whole_epoch_left_outlasts_a_restart(tmp_path, end_of_epoch):
    tally = counted()
    tally.last = {
        "rows": np.arange(4),
        "losses": np.float32([1, 2, math.inf, 4]),
        "selected": np.array([True, False, True, True]),
        "tau": 0.1,
    }
    again = recovered(tally, tmp_path, end_of_epoch=end_of_epoch)
    assert again.last.keys() == tally.last.keys()
    for name, value in tally.last.items():
        assert type(again.last[name]) is type(value)
        np.testing.assert_array_equal(again.last[name], value)
        assert np.asarray(again.last[name]).dtype == np.asarray(value).dtype
    again.start()  # nothing of the epoch that ended
    assert bool(again.counts) == bool(again.seen) == (not end_of_epoch)


def test_only_the_first_process_goes_on_with_what_all_had(
    tmp_path, monkeypatch
):
    """Steps that were skipped are alike in all, and are not added up."""
    tally = counted()
    monkeypatch.setattr(epoch_tally, "rank", lambda: 1)
    again = recovered(tally, tmp_path, end_of_epoch=False)
    again.start()
    assert again.counts == {"utterances": 0, "skipped": 2}
    assert again.seen == []


def test_a_checkpoint_says_how_large_a_batch_was(tmp_path):
    tally = counted()
    assert tally.batch_size_before == tally.batch_size == 1
    tally.batch_size = 384
    again = recovered(tally, tmp_path, end_of_epoch=False)
    assert again.batch_size_before == 384 and again.batch_size == 1
    again.start()
    assert again.batch_size_before == 1


def test_the_batch_of_an_earlier_versions_checkpoint(tmp_path, monkeypatch):
    """It has the number of processes, whose batches were as large as now."""
    saved = {"tally": {}, "seen": [], "seconds": 0.0, "processes": 4}
    torch.save(saved, tmp_path / "tally")
    monkeypatch.setattr(epoch_tally, "world_size", lambda: 2)
    tally = EpochTally("cpu", batch_size=2 * 96)
    tally.load(tmp_path / "tally", end_of_epoch=False)
    assert tally.batch_size_before == 4 * 96


def one_rank(rank, folder):
    os.environ["RANK"] = str(rank)  # SpeechBrain looks for it there
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(minutes=1),
    )
    tally = EpochTally("cpu")
    tally.add(utterances=3 + rank, skipped=torch.tensor(1.0))
    if rank == 1:  # the other has seen nothing
        tally.seen.append((torch.tensor([rank]),))
    tally.update_average(torch.tensor(2.0 + 4 * rank), 1, 0.0)
    assert tally.total() == {"utterances": 7, "skipped": 1}
    assert tally.mean_loss() == 4.0
    assert [part.tolist() for part in tally.join_seen()] == [[1]]
    tally.seen.insert(0, (torch.tensor([10 + rank]),))
    # In the order of the steps, the last of which both ended together.
    assert [part.tolist() for part in tally.join_seen()] == [[11, 10, 1]]
    check_collectives(rank)
    check_skipped(rank)
    check_files(rank, pathlib.Path(folder))
    torch.distributed.destroy_process_group()


def check_collectives(rank):
    """Both processes learn of what one of them meets."""

    def full():
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        from_main(full)
    assert from_main(lambda: rank) == 0
    stop = Stop()
    stop.requested = None if rank else signal.SIGTERM
    assert not stop.should_stop(collective=False)
    assert stop.should_stop(collective=True)
    norm = torch.nn.BatchNorm1d(2)
    norm.running_mean.fill_(rank)
    share_statistics(norm)
    assert norm.running_mean.tolist() == [0, 0]


def check_skipped(rank):
    """Both count a float16 step of which one has a loss that is not finite."""
    brain = types.SimpleNamespace(
        is_training=True,
        tally=EpochTally("cpu"),
        scaler=torch.amp.GradScaler("cpu"),
        guard=NonFiniteGuard(patience=9),
        accumulates=True,
        step=1,
        steps_per_reading=20,
    )
    for found in (math.nan, 2.0):
        loss = torch.tensor(found if rank else 2.0)
        SpeakerBrain.update_average(brain, loss, 0.0)
        assert brain.guard.in_a_row == math.isnan(found)
    assert brain.tally.counts["skipped"] == 1


def check_files(rank, folder):
    """One process writes, and both take the same checkpoint."""
    settings = types.SimpleNamespace(
        seed=1,
        anchor=0,
        new_encoder=lambda: types.SimpleNamespace(
            network=torch.nn.Linear(1, 1)
        ),
    )
    from_main(_keep_start, settings, folder / "start.ckpt", False)
    assert from_main((folder / "start.ckpt").exists)
    checkpointer = WholeCheckpointer(folder / "checkpoints")
    checkpointer.save_checkpoint()
    if rank == 1:  # whose disk cannot be read just now
        checkpointer._check = lambda path: False
    assert len(checkpointer.list_checkpoints()) == 1


def test_two_processes_count_together(tmp_path):
    torch.multiprocessing.spawn(one_rank, (tmp_path,), nprocs=2)
