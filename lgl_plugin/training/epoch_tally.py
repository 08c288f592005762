"""Counts of an epoch that survive an interruption, over all processes."""

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

# The same in each process, so that adding them up would count them twice.
SHARED = {"skipped"}


@register_checkpoint_hooks
class EpochTally:
    """Counts of the epoch under way, and what the last whole one left.

    Counts stay on the device until the epoch's end or a checkpoint: reading one
    at each step would make the host wait for the GPU. `seen` has tensors of
    each step, joined at the epoch's end. `average` is the mean loss, as
    SpeechBrain's: a loss that is not finite counts as the mean so far. `last`
    has arrays and numbers that a Brain keeps of the last whole epoch.
    """

    def __init__(self, device: str, batch_size: int = 1):
        self.device = device
        self.batch_size = batch_size  # of all processes together
        self.last = {}
        self._resumed = None
        self._saved = {}
        self.start()

    def start(self) -> None:
        """Begins an epoch, or goes on in the one that a checkpoint holds."""
        before, self._resumed = self._resumed or {}, None
        self.counts = before.get("tally", {})
        self.seen = before.get("seen", [])
        self.average = None
        self.started = time.perf_counter() - before.get("seconds", 0.0)

    @property
    def batch_size_before(self) -> int:
        """The whole batch of the epoch that a checkpoint holds."""
        before = self._resumed or {"batch_size": self.batch_size}
        if "processes" in before:  # of earlier versions, which kept batch_size
            return before["processes"] * self.batch_size // world_size()
        return before["batch_size"]

    def add(self, **values: torch.Tensor | float) -> None:
        """Adds detached scalars to the counts."""
        for name, value in values.items():
            self.counts[name] = self.counts.get(name, 0) + value

    def update_average(self, loss, step: int, before: float) -> None:
        """Takes a step's loss into the mean; `before` begins it anew.

        After an interruption SpeechBrain hands over the mean so far.
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
        """Returns what all processes put by, in its order; all must call."""
        own = [torch.cat(parts).cpu() for parts in zip(*self.seen)]
        shares = [share for share in gather_objects(own) if share]
        if not shares:
            return []
        # Processes step together, so their lists match from the end; rank 0
        # may hold more, from before an interruption.
        places = [torch.arange(-len(share[0]), 0) for share in shares]
        order = torch.cat(places).argsort(stable=True)
        return [torch.cat(parts)[order] for parts in zip(*shares)]

    @property
    def seconds(self) -> float:
        """Time since the epoch began, interruptions left out."""
        return time.perf_counter() - self.started

    def freeze(self, end_of_epoch: bool) -> None:
        """Collects from all processes what the next checkpoint keeps."""
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
        """Reads what `save` wrote; `start` then goes on from it."""
        saved = torch.load(path, map_location=self.device, weights_only=True)
        # Within an epoch, those of earlier versions lack it.
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
        if rank() > 0:  # the first process goes on with what all had
            saved["seen"] = []
            for name in saved["tally"].keys() - SHARED:
                saved["tally"][name] *= 0
        self._resumed = saved
