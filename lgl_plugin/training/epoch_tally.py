"""Counts of an epoch over all processes, which survive an interruption."""

import pathlib
import time

import numpy as np
import torch
from speechbrain.utils.checkpoints import (
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)

from lgl_plugin.utils.distributed import (
    gather_objects,
    rank,
    sum_over_ranks,
    world_size,
)

# Counts that are equal in all processes: a sum would count them several times.
SHARED = {"skipped"}


@register_checkpoint_hooks
class EpochTally:
    """Counts of the current epoch, and results of the last whole one.

    Counts stay on the device until the epoch's end or a checkpoint: reading one
    at each step would make the host wait for the GPU. `seen` has tensors of
    each step, joined at the epoch's end. `average` is the mean loss, as in
    SpeechBrain: a loss that is not finite counts as the mean so far. `last` has
    arrays and numbers that a Brain keeps of the last whole epoch.
    """

    def __init__(self, device: str, batch_size: int = 1):
        self.device = device
        self.batch_size = batch_size  # summed over all processes
        self.last = {}
        self._resumed = None
        self._saved = {}
        self.start()

    def start(self) -> None:
        """Begins an epoch, or resumes the one of a loaded checkpoint."""
        before, self._resumed = self._resumed or {}, None
        self.counts = before.get("tally", {})
        self.seen = before.get("seen", [])
        self.average = None
        self.started = time.perf_counter() - before.get("seconds", 0.0)

    @property
    def batch_size_before(self) -> int:
        """Batch size, over all processes, of the epoch in the checkpoint."""
        before = self._resumed or {"batch_size": self.batch_size}
        if "processes" in before:  # of earlier versions, which kept batch_size
            return before["processes"] * self.batch_size // world_size()
        return before["batch_size"]

    def add(self, **values: torch.Tensor | float) -> None:
        """Adds detached scalars to the counts."""
        for name, value in values.items():
            self.counts[name] = self.counts.get(name, 0) + value

    def update_average(self, loss, step: int, before: float) -> None:
        """Includes a step's loss in the mean.

        The first call after a start begins with `before`, SpeechBrain's mean so
        far, which a resumed epoch needs.
        """
        if self.average is None:
            self.average = torch.full((), before, device=loss.device)
        change = (loss - self.average) / step
        self.average += torch.where(loss.isfinite(), change, 0.0)

    def mean_loss(self) -> float:
        """Returns the mean loss over all processes; all must call."""
        total = sum_over_ranks({"loss": self.average})["loss"]
        return float(total) / world_size()

    def total(self) -> dict:
        """Returns the counts over all processes; all must call."""
        own = {k: v for k, v in self.counts.items() if k not in SHARED}
        shared = {k: v for k, v in self.counts.items() if k in SHARED}
        return {**sum_over_ranks(own), **shared}

    def join_seen(self) -> list[torch.Tensor]:
        """Returns `seen` of all processes in order of steps; all must call."""
        own = [torch.cat(parts).cpu() for parts in zip(*self.seen)]
        shares = [share for share in gather_objects(own) if share]
        if not shares:
            return []
        # Processes step together, so their lists match from the end. Rank 0 may
        # have more, from before an interruption.
        positions = [torch.arange(-len(share[0]), 0) for share in shares]
        order = torch.cat(positions).argsort(stable=True)
        return [torch.cat(parts)[order] for parts in zip(*shares)]

    @property
    def seconds(self) -> float:
        """Seconds since the epoch began, without interruptions."""
        return time.perf_counter() - self.started

    def freeze(self, end_of_epoch: bool) -> None:
        """Collects the contents of the next checkpoint from all processes."""
        last = {
            name: torch.from_numpy(value)
            if isinstance(value, np.ndarray)
            else value
            for name, value in self.last.items()
        }
        if end_of_epoch:
            self._saved = last
            return
        self._saved = {
            "last": last,
            "tally": self.total(),
            "seen": self.join_seen(),
            "seconds": self.seconds,
            "batch_size": self.batch_size,
        }

    @mark_as_saver
    def save(self, path: str | pathlib.Path) -> None:
        """Writes what `freeze` has collected."""
        torch.save(self._saved, path)

    @mark_as_loader
    def load(self, path: str | pathlib.Path, end_of_epoch: bool) -> None:
        """Reads what `save` wrote; `start` then resumes from it."""
        saved = torch.load(path, map_location=self.device, weights_only=True)
        # Checkpoints of earlier versions within an epoch lack "last".
        last = saved if end_of_epoch else saved.pop("last", {})
        self.last = {
            name: value.cpu().numpy()
            if isinstance(value, torch.Tensor)
            else value
            for name, value in last.items()
        }
        if end_of_epoch:
            return
        saved["seen"] = [tuple(saved["seen"])] if saved["seen"] else []
        if rank() > 0:  # the first process has the counts of all
            saved["seen"] = []
            for name in saved["tally"].keys() - SHARED:
                saved["tally"][name] *= 0
        self._resumed = saved
