"""SpeechBrain's private names are there, and do what we use them for."""

import inspect
import pathlib
import re

import pytest
import speechbrain
import torch
from speechbrain.core import Brain
from speechbrain.dataio.dataloader import SaveableDataLoader
from speechbrain.processing.features import Filterbank, InputNormalization
from speechbrain.utils.checkpoints import Checkpointer

import lgl_plugin
from lgl_plugin.utils import speechbrain_internals
from lgl_plugin.utils.speechbrain_internals import (
    HookedBrain,
    checkpoint_folders,
    read_checkpoints,
    skip_batches,
)

VERSION = f"SpeechBrain {speechbrain.__version__}"

SIGNATURES = [
    (Brain, "_save_intra_epoch_ckpt", "(self)"),
    (
        Brain,
        "_should_save_intra_epoch_ckpt",
        "(self, last_ckpt_time, steps_since_ckpt)",
    ),
    (Brain, "_wrap_distributed", "(self)"),
    (Checkpointer, "_list_checkpoint_dirs", "(self)"),
    (InputNormalization, "_compute_current_stats", "(self, x, mask, dim)"),
    (Filterbank, "_create_fbank_matrix", "(self, f_central_mat, band_mat)"),
    (Checkpointer, "_construct_checkpoint_objects", "(checkpoint_dirs)"),
]


def check(owner, name, expected):
    """Raises AssertionError if a private name is not as it was."""
    where = f"{VERSION}: {owner.__name__}.{name}"
    found = getattr(owner, name, None)
    assert found is not None, f"{where} is gone"
    signature = str(inspect.signature(found))
    assert signature == expected, f"{where} takes {signature}, not {expected}"


@pytest.mark.parametrize("owner, name, expected", SIGNATURES)
def test_a_private_name_is_as_it_was(owner, name, expected):
    check(owner, name, expected)


def test_a_name_that_is_gone_or_changed_is_named():
    """With the version that is installed."""
    with pytest.raises(AssertionError, match=f"{VERSION}: Brain._no is gone"):
        check(Brain, "_no", "(self)")
    with pytest.raises(AssertionError, match=rf"{VERSION}.* takes \(self\), n"):
        check(Brain, "_wrap_distributed", "(self, more)")


def test_every_private_name_is_checked_and_used_in_one_module():
    checked = {name for _, name, _ in SIGNATURES}
    checked.add("_speechbrain_recovery_skip_to")  # an attribute, see below
    here = pathlib.Path(speechbrain_internals.__file__)
    private = r"\b_[a-z]\w+"
    assert set(re.findall(private, here.read_text())) == checked
    package = pathlib.Path(lgl_plugin.__file__).parent
    others = [path for path in package.rglob("*.py") if path != here]
    assert len(others) > 40
    for path in others:
        assert not checked & set(re.findall(private, path.read_text())), path


def test_a_loader_skips_the_batches_that_it_is_told_to():
    where = f"{VERSION}: SaveableDataLoader._speechbrain_recovery_skip_to"
    loader = SaveableDataLoader(range(5), batch_size=1)
    skip_batches(loader, 3)
    seen = [batch.item() for batch in loader]
    assert seen == [3, 4], f"{where} does nothing"
    assert len(list(loader)) == 5  # the next epoch is whole


def test_checkpoints_are_listed_and_read(tmp_path):
    where = f"{VERSION}: Checkpointer"
    checkpointer = Checkpointer(tmp_path, {"layer": torch.nn.Linear(1, 1)})
    saved = checkpointer.save_checkpoint(meta={"epoch": 3})
    (tmp_path / "unfinished").mkdir()
    folders = checkpoint_folders(checkpointer)
    assert folders == [saved.path], f"{where}._list_checkpoint_dirs"
    (found,) = read_checkpoints(folders)
    assert found.meta["epoch"] == 3, f"{where}._construct_checkpoint_objects"
    assert found.paramfiles["layer"] == saved.path / "layer.ckpt"


class Hooked(HookedBrain):
    """Notes what happens before a checkpoint within an epoch."""

    def before_save_in_epoch(self):
        self.avg_train_loss = 5.0


@pytest.fixture
def brain(tmp_path):
    modules = {"layer": torch.nn.Linear(2, 2), "nothing": torch.nn.Identity()}
    options = {"device": "cpu", "ckpt_interval_steps": 2}
    return Hooked(modules, torch.optim.SGD, {}, options, Checkpointer(tmp_path))


@pytest.mark.parametrize("name", ["save_in_epoch", "_save_intra_epoch_ckpt"])
def test_a_save_within_an_epoch_runs_the_hook_first(brain, name):
    """Ours, and the one that SpeechBrain's `fit` calls."""
    brain.step = 7
    getattr(brain, name)()
    brain.step = brain.avg_train_loss = 0
    brain.checkpointer.recover_if_possible()
    assert (brain.step, brain.avg_train_loss) == (7, 5.0)


def test_speechbrains_fit_saves_by_the_name_that_is_hooked():
    code = inspect.getsource(Brain._fit_train)
    where = f"{VERSION}: Brain.fit saves within an epoch by another name"
    assert "self._save_intra_epoch_ckpt()" in code, where


def test_speechbrain_wraps_modules_by_the_name_that_is_hooked():
    code = inspect.getsource(Brain.on_fit_start)
    where = f"{VERSION}: Brain.on_fit_start wraps modules by another name"
    assert "self._wrap_distributed()" in code, where


@pytest.mark.parametrize(
    "device, norm", [("cpu", "BatchNorm1d"), ("cuda", "SyncBatchNorm")]
)
def test_batch_statistics_are_shared_on_gpus_and_sent_nowhere(
    brain, monkeypatch, device, norm
):
    """DINO's two passes of a step would fail behind buffers that are sent."""
    brain.modules["norm"] = torch.nn.BatchNorm1d(2)
    wrapped = []

    class Wrapper(torch.nn.Module):
        def __init__(self, module, device_ids, broadcast_buffers, **options):
            super().__init__()
            assert not broadcast_buffers
            assert device_ids == (None if device == "cpu" else [brain.device])
            self.module = module
            wrapped.append(module)

    monkeypatch.setattr(
        speechbrain_internals, "DistributedDataParallel", Wrapper
    )
    brain.device_type = device
    brain.on_fit_start()  # a single process
    assert not wrapped
    brain.distributed_launch = True
    brain.on_fit_start()
    assert [type(m).__name__ for m in wrapped] == ["Linear", norm]
    assert isinstance(brain.modules["nothing"], torch.nn.Identity)
