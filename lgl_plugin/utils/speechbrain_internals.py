"""SpeechBrain's private names that the package uses, all in one place.

A release of SpeechBrain may change them without notice;
tests/utils/test_speechbrain_internals.py then names the one that is gone.
"""

import pathlib
from collections.abc import Callable

import speechbrain as sb
from speechbrain.dataio.dataloader import SaveableDataLoader
from speechbrain.processing.features import Filterbank, InputNormalization
from speechbrain.utils.checkpoints import Checkpoint, Checkpointer
from torch.nn import SyncBatchNorm
from torch.nn.parallel import DistributedDataParallel


def checkpoint_folders(checkpointer: Checkpointer) -> list[pathlib.Path]:
    """Returns the folders of a checkpointer's checkpoints, without reading."""
    return checkpointer._list_checkpoint_dirs()


def read_checkpoints(folders: list[pathlib.Path]) -> list[Checkpoint]:
    """Reads what the metadata of checkpoints says of them."""
    return Checkpointer._construct_checkpoint_objects(folders)


def skip_batches(loader: SaveableDataLoader, n_batches: int) -> None:
    """Lets a loader begin its next epoch behind so many batches."""
    loader._speechbrain_recovery_skip_to = n_batches


def replace_statistics(
    module: InputNormalization, compute: Callable[..., tuple]
) -> None:
    """Lets `compute` find the mean and deviation of what it normalises."""
    module._compute_current_stats = compute


class ResidentFilterbank(Filterbank):
    """A filter bank that makes its filters once; as a class, for copies."""

    @classmethod
    def replace(cls, bank: Filterbank) -> None:
        """Turns a Filterbank into one of these; filters become a buffer."""
        size = bank.all_freqs_mat.shape
        filters = bank._create_fbank_matrix(
            bank.f_central[:, None].expand(size),
            bank.band[:, None].expand(size),
        )
        bank.register_buffer("filters", filters, persistent=False)
        bank.__class__ = cls

    def _create_fbank_matrix(self, f_central_mat, band_mat):
        return self.filters


class HookedBrain(sb.Brain):
    """SpeechBrain's Brain with public names for two private hooks.

    A checkpoint within an epoch waits for the step of the optimiser: it does
    not hold a gradient that is being accumulated.
    """

    save_is_due = False
    may_wait = True  # at this step, for the device and the other processes

    @property
    def accumulates(self) -> bool:
        """Says whether a part of the next step's gradient is there."""
        return self.step % self.grad_accumulation_factor != 0

    def before_save_in_epoch(self) -> None:
        """Runs, on every rank, before a checkpoint within an epoch is saved."""

    def save_in_epoch(self) -> None:
        """Saves a checkpoint from which the epoch goes on.

        At the epoch's end, too, whose last gradient may be a part of a step's
        and is thrown away.
        """
        self.save_is_due = False
        self.before_save_in_epoch()
        super()._save_intra_epoch_ckpt()

    def _should_save_intra_epoch_ckpt(self, last_ckpt_time, steps_since_ckpt):
        # SpeechBrain lets the processes ask each other at each step, for which
        # each waits for its GPU.
        due = 0 < self.ckpt_interval_steps <= steps_since_ckpt
        return (self.may_wait or due) and super()._should_save_intra_epoch_ckpt(
            last_ckpt_time, steps_since_ckpt
        )

    def _save_intra_epoch_ckpt(self):
        self.save_is_due = self.accumulates
        if not self.save_is_due:
            self.save_in_epoch()

    def _wrap_distributed(self):
        # As SpeechBrain does, but for two things. torch has no synchronised
        # batch statistics for CPUs, and converting to them raises: there each
        # process keeps its own. And buffers are not sent at each forward pass:
        # that would spoil the gradient of an earlier pass of the step, such as
        # of DINO's global views, on a GPU where there is one process.
        if not self.distributed_launch:
            return
        on_gpu = self.device_type != "cpu"
        for name, module in self.modules.items():
            if any(p.requires_grad for p in module.parameters()):
                if on_gpu:
                    module = SyncBatchNorm.convert_sync_batchnorm(module)
                self.modules[name] = DistributedDataParallel(
                    module,
                    device_ids=[self.device] if on_gpu else None,
                    find_unused_parameters=self.find_unused_parameters,
                    broadcast_buffers=False,
                )
