"""All private names of SpeechBrain that the package uses.

A release of SpeechBrain may change private names without notice. Then
tests/utils/test_speechbrain_internals.py names the one that is missing.
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
    """Lists the folders of a checkpointer's checkpoints without reading any."""
    return checkpointer._list_checkpoint_dirs()


def read_checkpoints(folders: list[pathlib.Path]) -> list[Checkpoint]:
    """Reads the metadata of checkpoints."""
    return Checkpointer._construct_checkpoint_objects(folders)


def skip_batches(loader: SaveableDataLoader, n_batches: int) -> None:
    """Lets a loader skip the first `n_batches` of its next epoch."""
    loader._speechbrain_recovery_skip_to = n_batches


def replace_statistics(
    module: InputNormalization, compute: Callable[..., tuple]
) -> None:
    """Makes a normalisation take its mean and deviation from `compute`."""
    module._compute_current_stats = compute


class ResidentFilterbank(Filterbank):
    """A filter bank that computes its filters once.

    It is a class and not a patched method, so that a copy of the bank uses the
    copy's own filters.
    """

    @classmethod
    def replace(cls, bank: Filterbank) -> None:
        """Gives a Filterbank this class, and its filters as a buffer."""
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

    A checkpoint within an epoch is put off to the optimiser's next step,
    because a checkpoint does not contain accumulated gradients.
    """

    save_is_due = False
    # This step may synchronise with the GPU and the other processes.
    may_wait = True

    @property
    def accumulates(self) -> bool:
        """Tells whether part of the optimiser's next gradient is computed."""
        return self.step % self.grad_accumulation_factor != 0

    def before_save_in_epoch(self) -> None:
        """Runs, on every rank, before a checkpoint within an epoch is saved."""

    def save_in_epoch(self) -> None:
        """Saves a checkpoint from which the epoch can continue.

        Also called at the epoch's end, where a gradient that does not complete
        an optimiser's step is dropped.
        """
        self.save_is_due = False
        self.before_save_in_epoch()
        super()._save_intra_epoch_ckpt()

    def _should_save_intra_epoch_ckpt(self, last_ckpt_time, steps_since_ckpt):
        # SpeechBrain synchronises the processes at each step to decide, for
        # which each process waits for its GPU.
        due = 0 < self.ckpt_interval_steps <= steps_since_ckpt
        return (self.may_wait or due) and super()._should_save_intra_epoch_ckpt(
            last_ckpt_time, steps_since_ckpt
        )

    def _save_intra_epoch_ckpt(self):
        self.save_is_due = self.accumulates
        if not self.save_is_due:
            self.save_in_epoch()

    def _wrap_distributed(self):
        # Differs from SpeechBrain's method in two ways. torch has no
        # synchronised batch statistics for CPUs, and the conversion raises: on
        # CPUs each process keeps its own statistics. And buffers are not
        # broadcast at each forward pass: on a GPU, with one process, that would
        # spoil the gradient of an earlier pass of the same step, such as that
        # of DINO's global views.
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
