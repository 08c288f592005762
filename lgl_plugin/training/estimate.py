"""Estimates the cost of a run on this machine from a few of its steps."""

import contextlib
import pathlib
import tempfile
import time
from typing import Any

import numpy as np
import torch

from lgl_plugin.inference.extractor import MAX_SECONDS
from lgl_plugin.training.brain import SpeakerBrain
from lgl_plugin.training.fit import fit
from lgl_plugin.training.session import Session
from lgl_plugin.utils.device import peak_bytes


def seconds_per_step(
    session: Session,
    brain_class: type[SpeakerBrain],
    modules: dict[str, torch.nn.Module],
    **options: Any,
) -> float:
    """Trains modules for an epoch and returns the mean time of a step.

    The arguments are those of `training.fit.fit`. A step's time is measured
    from the end of the step before, and includes the wait for the loader. If
    there are several steps, the first is left out, because it allocates memory.
    On a GPU the steps that the loader's processes have read ahead are left out,
    too. The result is the mean and not the median, because the loader delivers
    in bursts.
    """
    started, ended = [], []

    class Timed(brain_class):
        """Records when each step begins and ends."""

        def fit_batch(self, batch):
            started.append(time.perf_counter())
            loss = super().fit_batch(batch)
            if self.device_type == "cuda":
                torch.cuda.synchronize()  # the host runs ahead of the GPU
            ended.append(time.perf_counter())
            return loss

    with tempfile.TemporaryDirectory(dir=session.run.folder) as folder:
        fit(session, Timed, modules, pathlib.Path(folder), 1, **options)
    if len(ended) == 1:
        return ended[0] - started[0]
    # On a CPU a step takes longer than reading a batch.
    ahead = session.settings.dataloader_options.read_ahead
    ahead *= session.device != "cpu"
    # If all steps were read ahead, only the last one is timed.
    ahead = min(ahead, len(ended) - 2)
    return float(np.diff(ended)[ahead:].mean())


def speech_per_second(session: Session, encoder: torch.nn.Module) -> float:
    """Embeds all utterances; returns the seconds of speech per second."""
    started = time.perf_counter()
    session.embed(encoder)
    seconds = np.minimum(session.manifest.durations, MAX_SECONDS).sum()
    return float(seconds) / (time.perf_counter() - started)


def peak_memory(device: str) -> tuple[int | None, int]:
    """Returns the peak bytes of this process, and those of its GPU.

    The process's value is None if Python cannot measure it, as on Windows.
    """
    process_bytes = None
    with contextlib.suppress(ImportError):
        import resource

        process_bytes = peak_bytes(resource.getrusage(resource.RUSAGE_SELF))
    on_gpu = "cuda" in device
    return process_bytes, torch.cuda.max_memory_reserved(
        device
    ) if on_gpu else 0
