"""The Brain that all trainers extend: steps, epochs, signals, checkpoints."""

import math
import random
from collections.abc import Callable

import speechbrain as sb
import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.nnet.schedulers import update_learning_rate
from speechbrain.utils.logger import get_logger

from lgl_plugin.dataio.bad_files import BadFiles
from lgl_plugin.dataio.sampler import PassSampler
from lgl_plugin.nnet.batch_norm import finite_statistics, share_statistics
from lgl_plugin.nnet.schedules import WarmupCosine
from lgl_plugin.training.epoch_selection import criterion
from lgl_plugin.training.epoch_tally import EpochTally
from lgl_plugin.training.held_out import HeldOut, separate_generator
from lgl_plugin.training.meetings import Meetings
from lgl_plugin.training.nonfinite import NonFiniteGuard
from lgl_plugin.utils.distributed import rank, sum_over_ranks
from lgl_plugin.utils.signals import stop
from lgl_plugin.utils.speechbrain_internals import HookedBrain, skip_batches

logger = get_logger(__name__)

# Number of steps between two readings of the loss by a GPU's host, and the
# largest number between two exchanges of all processes on stopping and saving.
STEPS_PER_READING = 20


class SpeakerBrain(HookedBrain):
    """Trains an encoder; a subclass defines its objective.

    A subclass implements `compute_forward` and `compute_objectives` for
    training, and `epoch_summary()`, which returns the epoch's figures as a dict
    of plain numbers. The modules must include `encoder` and `augment`. This
    class embeds held-out utterances, in the same way for all subclasses.

    Arguments
    ---------
    modules, opt_class, hparams, run_opts, checkpointer
        Those of SpeechBrain's Brain. `lr_annealing` and `selection` are read
        from `hparams`.
    bad_files : lgl_plugin.dataio.bad_files.BadFiles
        Counts bad utterances.
    log : callable
        Takes a dict of plain numbers at the end of each epoch.
    examine : callable, optional
        Takes the encoder after an epoch, and returns further figures as a dict
        of plain numbers.
    train_sampler : lgl_plugin.dataio.sampler.PassSampler, optional
        Sampler of the training data, if it is not SpeechBrain's.
    steps_per_epoch : int
        Number of steps of an epoch, for a learning rate that changes at each
        step.
    epochs_before : int
        Epochs of earlier phases, whose learning-rate schedule this phase
        continues.
    epochs_in_all : int
        Epochs of all phases that share one learning-rate schedule.
    keep_checkpoints : int
        Number of epochs whose checkpoints are kept.
    batch_size : int
        Batch size, summed over all processes.
    seed : int
        Seed of the augmentations.
    """

    def __init__(
        self,
        modules: dict,
        opt_class: Callable,
        hparams: dict,
        run_opts: dict,
        checkpointer: sb.utils.checkpoints.Checkpointer,
        *,
        bad_files: BadFiles,
        log: Callable[[dict], None],
        examine: Callable[[torch.nn.Module], dict] = lambda encoder: {},
        train_sampler: PassSampler | None = None,
        steps_per_epoch: int = 1,
        epochs_before: int = 0,
        epochs_in_all: int = 1,
        keep_checkpoints: int = 1,
        batch_size: int = 1,
        seed: int = 0,
    ):
        super().__init__(modules, opt_class, hparams, run_opts, checkpointer)
        self.bad_files = bad_files
        self.log = log
        self.examine = examine
        self.train_sampler = train_sampler
        self.steps_per_epoch = steps_per_epoch
        self.epochs_before = epochs_before
        self.epochs_in_all = epochs_in_all
        self.keep_checkpoints = keep_checkpoints
        self.seed = seed
        self.done = 0.0
        self.skipped = torch.zeros((), device=self.device)
        self.tally = EpochTally(self.device, batch_size)
        self.held_out = HeldOut()
        self.guard = NonFiniteGuard(self.nonfinite_patience)
        # On a CPU a reading does not wait for queued work.
        on_cpu = self.device_type == "cpu"
        self.steps_per_reading = 1 if on_cpu else STEPS_PER_READING
        self.meetings = Meetings(STEPS_PER_READING)
        self.may_wait = True
        self.checkpointer.add_recoverable("epoch", self.tally)

    def crops(self, batch: PaddedBatch) -> torch.Tensor:
        """Moves a batch to the device; returns crops (batch, crops, samples).

        Bad utterances of the batch are counted.
        """
        lines = [line for bad in batch.bad for line in bad.splitlines()]
        self.bad_files.add(line.split("\t", 1) for line in lines)
        return batch.to(self.device, non_blocking=True).sig.data

    def anneal(self) -> None:
        """Sets `done`, the finished share, and the step's learning rate."""
        schedule = self.hparams.lr_annealing
        epochs = self.epochs_before + self.epoch - 1
        self.done = epochs + self.step / self.steps_per_epoch
        self.done /= self.epochs_in_all
        if isinstance(schedule, WarmupCosine):
            lr = schedule(self.done)
        else:  # SpeechBrain's StepScheduler counts epochs from 0
            lr, _ = schedule(epochs)
        for optimizer in self.optimizers_dict.values():
            update_learning_rate(optimizer, lr)
            for group in optimizer.param_groups:
                group["lr"] *= group.get("lr_scale", 1.0)

    def on_fit_start(self) -> None:
        """Resumes a run, possibly with another number of processes."""
        super().on_fit_start()
        counter = self.checkpointer.recoverables.get("counter")
        limit = self.optimizer_step_limit or math.inf
        if counter and self.step == 0 and self.optimizer_step >= limit:
            # If a run was killed after its last step, SpeechBrain would begin
            # an epoch without steps, and so without figures.
            counter.current = counter.limit
        before, now = self.tally.batch_size_before, self.tally.batch_size
        if before != now:
            done = self.step  # an epoch has as many steps as before
            if not getattr(self.hparams, "steps_per_epoch", None):
                # An epoch is a pass over the data: the share done, rounded down
                # to whole batches.
                done = self.step * before // now
            logger.info(
                "The epoch goes on at step %d in batches of %d; %d steps of it "
                "were done in batches of %d",
                *(done, now, self.step, before),
            )
            self.step = done
            loader = self.checkpointer.recoverables["dataloader-TRAIN"]
            skip_batches(loader, done)

    def on_stage_start(self, stage, epoch=None) -> None:
        """Begins the epoch's tally; signals now wait for the end of a step."""
        self.is_training = stage == sb.Stage.TRAIN
        if not self.is_training:
            return
        self.tally.start()
        self.meetings.start(self.step)
        self.epoch = epoch
        stop.deferred = True

    def fit_batch(self, batch) -> torch.Tensor:
        """Does a step without making the host wait for the device.

        SpeechBrain reads the loss and the gradient of every parameter at each
        step. The GPU would then be idle while the next step is prepared.
        """
        # The key gives a resumed run the draws of an uninterrupted one.
        key = f"{self.seed} {self.epoch} {self.step} {rank()}"
        torch.manual_seed(random.Random(key).getrandbits(63))
        self.anneal()
        should_step = not self.accumulates
        self.on_fit_batch_start(batch, should_step)
        with self.no_sync(not should_step), finite_statistics(self.modules):
            with self.training_ctx:
                outputs = self.compute_forward(batch, sb.Stage.TRAIN)
                loss = self.compute_objectives(outputs, batch, sb.Stage.TRAIN)
            self.scaler.scale(loss / self.grad_accumulation_factor).backward()
        if should_step:
            self.optimizers_step()
        self.tally.add(utterances=len(batch.id), batches=1)
        self.on_fit_batch_end(batch, outputs, loss, should_step)
        return loss.detach()

    def optimizers_step(self, limit: float | None = None) -> None:
        """Clips the gradient and steps, unless the gradient is not finite.

        With a `limit` each parameter's gradient is clipped to that norm first.
        """
        if self.scaler.is_enabled():  # float16
            self.scaler.unscale_(self.optimizer)
        self.skipped = self.guard.step(
            self.optimizer, self.max_grad_norm, limit
        )
        if self.scaler.is_enabled():
            # The scaler finds its scale by overflowing gradients. So only
            # losses that are not finite count, in `update_average`.
            self.scaler.update()
        else:
            self.guard.count(self.skipped)
            self.tally.add(skipped=self.skipped)
        self.optimizer_step += 1

    def update_average(self, loss, avg_loss) -> float:
        """Returns the epoch's mean loss, which is read every few steps.

        If a signal asked the run to stop, the process saves a checkpoint and
        ends here.
        """
        if not self.is_training:  # held-out utterances have no loss
            return avg_loss
        self.tally.update_average(loss, self.step, avg_loss)
        if self.scaler.is_enabled():
            # Summed over all processes: if one process ended the run alone, the
            # others would wait for its gradients.
            total = sum_over_ranks({"skipped": ~loss.isfinite()})
            skipped = (total["skipped"] > 0).float()
            self.guard.count(skipped)
            self.tally.add(skipped=skipped)
        # Nothing is saved after a step that only accumulates.
        self.may_wait = not self.accumulates and self.meetings.is_due(self.step)
        if not self.accumulates:
            self._leave_if_asked(self.may_wait)
            if self.save_is_due:
                self.save_in_epoch()
        if self.may_wait:
            self.meetings.hold(self.step)
        # Also read at the first step: the bar of a short epoch would show 0.
        if self.step > 1 and self.step % self.steps_per_reading:
            return avg_loss
        self.guard.check(self)
        return float(self.tally.average)

    def _leave_if_asked(self, collective):
        """Writes a checkpoint and ends the process if a signal asked for it."""
        if stop.should_stop(collective):
            self.save_in_epoch()
            stop.leave()

    def before_save_in_epoch(self) -> None:
        """Collects the tally of all processes for the checkpoint."""
        # Otherwise SpeechBrain saves the mean of the last reading.
        self.avg_train_loss = self.tally.mean_loss()
        self.tally.freeze(end_of_epoch=False)

    @torch.no_grad()
    def evaluate_batch(self, batch, stage) -> torch.Tensor:
        """Embeds held-out crops in two views; there is no loss."""
        with self.evaluation_ctx:
            self.held_out.embed(
                self.modules.encoder,
                self.modules.augment,
                self.crops(batch),
                seed=self.step,
            )
        return torch.zeros(())

    def on_stage_end(self, stage, stage_loss, epoch=None) -> None:
        """Logs the epoch and saves a checkpoint."""
        if stage == sb.Stage.TRAIN:
            share_statistics(self.modules)
            if self.tally.average is None:  # resumed after the last batch
                self.tally.average = torch.tensor(stage_loss)
            self._leave_if_asked(collective=True)
            self.guard.check(self)
            counts = self.tally.total()
            seconds = self.tally.seconds
            group = self.optimizer.param_groups[0]
            self.record = {
                "epoch": epoch,
                "loss": self.tally.mean_loss(),
                **self.epoch_summary(),
                "skipped_steps": int(counts.get("skipped", 0)),
                "lr": group["lr"] / group.get("lr_scale", 1.0),
                "utterances_per_second": float(counts["utterances"]) / seconds,
                "seconds": seconds,
            }
            return
        self.record.update(self.held_out.measure(epoch))
        with separate_generator(self.device):
            self.record.update(self.examine(self.modules.encoder))
        cost = criterion(self.record, self.hparams.selection)
        self.log(self.record)
        self.tally.freeze(end_of_epoch=True)
        self.checkpointer.save_and_keep_only(
            meta={"criterion": float(cost), "epoch": epoch},
            min_keys=["criterion"],
            num_to_keep=self.keep_checkpoints,
        )
        # A signal during the held-out crops waits until here: without the
        # checkpoint above the epoch would be lost.
        if stop.should_stop(collective=True):
            stop.leave()
        stop.deferred = False
