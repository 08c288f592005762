"""The two trainers: SimCLR for Stage I, loss-gated AAM for Stage II."""

import math
import random
import time

import numpy as np
import speechbrain as sb
import torch
from speechbrain.nnet.schedulers import update_learning_rate
from speechbrain.utils.logger import get_logger
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam

from lgl_plugin.nnet.batch_norm import finite_statistics
from lgl_plugin.nnet.ecapa_patches import lean_pooling
from lgl_plugin.training.epoch_selection import (
    contrastive_accuracy,
    criterion,
    pseudo_trial_eer,
)
from lgl_plugin.training.health import geometry
from lgl_plugin.utils.distributed import (
    gather,
    rank,
    sum_over_ranks,
    world_size,
)
from lgl_plugin.utils.signals import stop

logger = get_logger(__name__)

# Between looks at the loss: a look waits until the device has caught up.
STEPS_PER_LOOK = 20


class SpeakerBrain(sb.Brain):
    """What both stages share: embeddings, held-out pseudo-trials, logging.

    It expects the modules compute_features, mean_var_norm, embedding_model
    and augment, and these attributes, which `iterations` sets:

    log : callable
        Takes a dict of plain numbers at each epoch's end.
    bad_files : lgl_plugin.dataio.bad_files.BadFiles
        Where bad utterances are counted.
    examine : callable
        Takes the encoder after an epoch, returns what else is to be known of
        it as a dict of plain numbers.
    epochs_before : int
        Epochs of the phase that this one goes on from.
    seed : int
        Of the augmentations.
    train_data : lgl_plugin.dataio.dataset.UtteranceDataset
        What is trained on, to be told of each epoch.

    A subclass gives `epoch_summary()`, the trained epoch's own figures as a
    dict of plain numbers, and in `of_epoch` the names of its attributes that
    tell of the last whole epoch. A checkpoint keeps these, and within an epoch
    what was counted so far.
    """

    log = staticmethod(lambda record: None)
    bad_files = None
    examine = staticmethod(lambda encoder: {})
    epochs_before = 0
    seed = 0
    train_data = None
    of_epoch = ()
    resumed = None
    skipped_in_a_row = 0

    def _wrap_distributed(self):
        """SpeechBrain's; on CPUs, for which torch has no synchronised batch
        statistics, each process keeps its own."""
        if not self.distributed_launch or self.device_type != "cpu":
            super()._wrap_distributed()
            return
        for name, module in self.modules.items():
            if any(p.requires_grad for p in module.parameters()):
                self.modules[name] = DistributedDataParallel(module)

    def embed(self, wavs, wrapped=True):
        """Waveforms (batch, time) to embeddings (batch, dim), float32."""
        features = self.modules.compute_features(wavs)
        everything = torch.ones(len(wavs), device=wavs.device)
        features = self.modules.mean_var_norm(features, everything)
        encoder = self.module("embedding_model", wrapped)
        return encoder(features)[:, 0].float()

    def module(self, name, wrapped=True):
        """A module, with or without what data parallelism put around it."""
        module = self.modules[name]
        if not wrapped and isinstance(module, DistributedDataParallel):
            module = module.module
        return module

    def own_generator(self):
        """A context in which random numbers do not change the training's."""
        devices = [self.device] if self.device_type == "cuda" else []
        return torch.random.fork_rng(devices=devices)

    def held_out_embeddings(self, crops):
        """Embeddings of two crops, augmented alike at every epoch.

        Arguments
        ---------
        crops : torch.Tensor
            Shape (batch, 2, time).

        Returns
        -------
        torch.Tensor
            Shape (2, batch, dim).
        """
        with self.own_generator():
            torch.manual_seed(self.step)
            # Apart, so that no crop babbles over the other of its utterance.
            views = [self.modules.augment(view) for view in crops.unbind(1)]
        return torch.stack([self.embed(view) for view in views])

    def on_stage_start(self, stage, epoch=None):
        """Starts the clock and the epoch's tallies, unless resumed."""
        if stage != sb.Stage.TRAIN:
            self.held_out = []
            return
        so_far, self.resumed = self.resumed or {}, None
        self.tally = so_far.get("tally", {})
        self.seen = so_far.get("seen", [])
        self.average = None
        self.started = time.perf_counter() - so_far.get("seconds", 0.0)
        stop.deferred = True
        self.epoch = epoch
        if self.train_data is not None:
            self.train_data.set_epoch(epoch)

    def on_fit_batch_start(self, batch, should_step):
        """Seeds what a step draws by its number and the process's.

        So a run that goes on from a checkpoint draws what it would have.
        """
        key = f"{self.seed} {self.epoch} {self.step} {rank()}"
        torch.manual_seed(random.Random(key).getrandbits(63))

    def anneal(self, epoch):
        """Sets the learning rate of an epoch.

        A phase that goes on from another counts that one's epochs too, so
        that its first steps do not undo what was learnt.
        """
        lr, _ = self.hparams.lr_annealing(self.epochs_before + epoch)
        for optimizer in self.optimizers_dict.values():
            update_learning_rate(optimizer, lr)

    def on_fit_start(self):
        """Also sets the first epoch's learning rate, unless resumed."""
        self.checkpointer.add_recoverable(
            "epoch", self, SpeakerBrain._load_epoch, SpeakerBrain._save_epoch
        )
        super().on_fit_start()
        if self.optimizer_step == 0:
            self.anneal(1)
        if self.resumed and self.resumed["processes"] != world_size():
            self.share_anew(self.resumed["processes"])

    def share_anew(self, before):
        """Goes on in an epoch that another number of processes began.

        They stop reading as far into the epoch as those had come, rounded
        down to whole batches.
        """
        loader = self.checkpointer.recoverables["dataloader-TRAIN"]
        done = self.step * before // world_size()
        logger.info(
            "%d processes go on at step %d of the epoch, where %d had come to "
            "step %d",
            *(world_size(), done, before, self.step),
        )
        self.step = loader._speechbrain_recovery_skip_to = done

    def count(self, **values):
        """Adds detached scalars to the epoch's tallies, on the device."""
        for name, value in values.items():
            self.tally[name] = self.tally.get(name, 0) + value

    def fit(self, *args, **kwargs):
        """SpeechBrain's, with a pooling that moves less memory."""
        with lean_pooling(self.modules.embedding_model):
            super().fit(*args, **kwargs)

    def fit_batch(self, batch):
        """SpeechBrain's, but the host does not wait for the device.

        SpeechBrain reads the loss, and the gradient of every parameter, at
        each step; a GPU then idles while the next step is being prepared.
        """
        should_step = self.step % self.grad_accumulation_factor == 0
        self.on_fit_batch_start(batch, should_step)
        with self.no_sync(not should_step), finite_statistics(self.modules):
            with self.training_ctx:
                outputs = self.compute_forward(batch, sb.Stage.TRAIN)
                loss = self.compute_objectives(outputs, batch, sb.Stage.TRAIN)
            self.scaler.scale(loss / self.grad_accumulation_factor).backward()
        if should_step:
            self.optimizers_step()
        self.on_fit_batch_end(batch, outputs, loss, should_step)
        return loss.detach()

    def optimizers_step(self):
        """Clips the gradient and steps, unless the gradient is not finite."""
        if self.scaler.is_enabled():  # float16, whose scaler skips such steps
            super().optimizers_step()
            return
        skipped = self.guarded_step(self.optimizer, self.max_grad_norm)
        self.count_skipped(skipped)
        self.optimizer_step += 1

    def count_skipped(self, skipped):
        """Counts a step, 1 if it was skipped, or 0; a scalar on the device."""
        self.count(skipped=skipped)
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * skipped

    def guarded_step(self, optimizer, max_grad_norm=math.inf):
        """One optimiser's step; none where its gradient is not finite.

        torch's fused Adam decides that on the device. For others the host
        waits for the gradient's norm.

        Returns
        -------
        torch.Tensor
            1 if the step was skipped, or 0; a scalar on the device.
        """
        parameters = [
            parameter
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        skipped = (~norm.isfinite()).float()
        if isinstance(optimizer, Adam) and optimizer.defaults.get("fused"):
            optimizer.found_inf = skipped
            optimizer.step()
        elif not skipped:
            optimizer.step()
        optimizer.zero_grad()
        return skipped

    def update_average(self, loss, avg_loss):
        """The epoch's mean loss, of which the host hears now and then.

        Raises
        ------
        ValueError
            From `check_skipped`.
        SystemExit
            If the run was told to stop; a checkpoint is there then.
        """
        if self.average is None:  # or of the part before an interruption
            self.average = torch.tensor(avg_loss, device=loss.device)
        change = (loss - self.average) / self.step
        self.average += torch.where(loss.isfinite(), change, 0.0)
        if self.scaler.is_enabled():
            self.count_skipped((~loss.isfinite()).float())
        look = self.step % STEPS_PER_LOOK == 0
        self.leave_if_asked(look)
        if not look:
            return avg_loss
        self.check_skipped()
        return float(self.average)

    def leave_if_asked(self, look):
        """Writes a checkpoint and leaves if told to, see `Stop.should_stop`."""
        if stop.should_stop(collective=look):
            self._save_intra_epoch_ckpt()
            stop.leave()

    def check_skipped(self):
        """Ends the run if too many steps in a row were skipped.

        Raises
        ------
        ValueError
            If they are more than `--nonfinite_patience` allows. It says how
            training went until then, and what to try.
        """
        skipped = int(self.skipped_in_a_row)
        if skipped <= self.nonfinite_patience:
            return
        broken = [
            name
            for name, module in self.modules.items()
            if not all(p.isfinite().all() for p in module.parameters())
        ]
        lr = self.optimizer.param_groups[0]["lr"]
        if broken:  # by no step of this run
            advice = (
                f"The weights of {', '.join(broken)} are not finite: they were "
                "so when loaded. Begin with other weights "
                "(pretrained_encoder)."
            )
        elif skipped >= self.step:
            advice = (
                "No step of the epoch was finite. Try --precision=fp32; if "
                f"earlier epochs trained, a lower lr, which is {lr:.2g} here."
            )
        else:
            advice = (
                f"The epoch's other steps had a mean loss of "
                f"{float(self.average):.4g}. Try a lower lr, which is "
                f"{lr:.2g} here, or --precision=fp32."
            )
        raise ValueError(
            f"The last {skipped} steps, up to step {self.step} of epoch "
            f"{self.epoch}, had a loss or a gradient that is not finite, more "
            f"in a row than the {self.nonfinite_patience} that "
            "--nonfinite_patience allows. None of them changed a parameter. "
            f"{advice}"
        )

    def _save_intra_epoch_ckpt(self):
        """Saves what all processes have counted, too."""
        # As of now, not as of the last look.
        self.avg_train_loss = self.mean_loss()
        counts = dict(self.tally)
        skipped = counts.pop("skipped", 0)  # alike in all
        self.kept = {
            "tally": {**sum_over_ranks(counts), "skipped": skipped},
            "seen": self.join_seen(),
            "seconds": time.perf_counter() - self.started,
            "processes": world_size(),
        }
        super()._save_intra_epoch_ckpt()

    def _save_epoch(self, path):
        torch.save(self.kept, path)

    def _load_epoch(self, path, end_of_epoch):
        kept = torch.load(path, map_location=self.device, weights_only=True)
        if end_of_epoch:
            for name, value in kept.items():
                is_array = isinstance(value, torch.Tensor)
                value = value.cpu().numpy() if is_array else value
                setattr(self, name, value)
            return
        kept["seen"] = [tuple(kept["seen"])] if kept["seen"] else []
        if rank() > 0:  # the first has what all had
            kept["seen"] = []
            for name in kept["tally"].keys() - {"skipped"}:
                kept["tally"][name] *= 0
        self.resumed = kept

    def mean_loss(self):
        """The epoch's mean loss over all processes so far."""
        total = sum_over_ranks({"loss": self.average})["loss"]
        return float(total) / world_size()

    def join_seen(self):
        """What all processes have seen of the epoch, one tensor of each."""
        own = [torch.cat(of).cpu() for of in zip(*self.seen)]
        shares = [share for share in gather(own) if share]
        return [torch.cat(of) for of in zip(*shares)]

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Counts utterances and hands on the bad ones."""
        self.count(utterances=len(batch.id), batches=1)
        self.count_bad(batch)

    def count_bad(self, batch):
        """Hands on what was bad among a batch's utterances."""
        lines = [line for bad in batch.bad for line in bad.splitlines()]
        self.bad_files.add(line.split("\t", 1) for line in lines)

    def evaluate_batch(self, batch, stage):
        """Embeds held-out crops; bad utterances count here too."""
        self.count_bad(batch)
        return super().evaluate_batch(batch, stage)

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Logs the epoch, moves the learning rate, saves a checkpoint."""
        if stage == sb.Stage.TRAIN:
            if self.average is None:  # resumed behind the last batch
                self.average = torch.tensor(stage_loss)
            self.leave_if_asked(look=True)  # since the last look, that is
            stop.end_deferral()
            self.check_skipped()
            skipped = int(self.tally.pop("skipped", 0))  # alike in all
            self.tally = sum_over_ranks(self.tally)
            seconds = time.perf_counter() - self.started
            self.record = {
                "epoch": epoch,
                "loss": self.mean_loss(),
                **self.epoch_summary(),
                "skipped_steps": skipped,
                "lr": self.optimizer.param_groups[0]["lr"],
                "utterances_per_second": float(self.tally["utterances"])
                / seconds,
                "seconds": seconds,
            }
            return
        first, second = torch.cat(self.held_out, dim=1).numpy()
        if not np.isfinite([first, second]).all():
            raise ValueError(
                f"After epoch {epoch} the embeddings of held-out utterances "
                "are not finite, though the steps of training were. Try "
                "--eval_precision=fp32, or a lower lr."
            )
        self.record.update(geometry(first, second))
        self.record["pseudo_eer"] = 100 * float(pseudo_trial_eer(first, second))
        self.record["contrastive_accuracy"] = contrastive_accuracy(
            first, second
        )
        with self.own_generator():  # looking changes nothing
            self.record.update(self.examine(self.modules.embedding_model))
        best = criterion(self.record, self.hparams.selection)
        self.log(self.record)
        self.anneal(epoch + 1)
        self.kept = {name: getattr(self, name) for name in self.of_epoch}
        for name, value in self.kept.items():
            if isinstance(value, np.ndarray):
                self.kept[name] = torch.from_numpy(value)
        self.checkpointer.save_and_keep_only(
            meta={"criterion": float(best), "epoch": epoch},
            min_keys=["criterion"],
        )
