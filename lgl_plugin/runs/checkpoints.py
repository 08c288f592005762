"""Checkpoints that are written atomically and checked before loading."""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Collection
from typing import Any

import torch
from speechbrain.utils.checkpoints import Checkpoint, Checkpointer
from speechbrain.utils.distributed import (
    ddp_barrier,
    if_main_process,
    main_process_only,
)
from speechbrain.utils.logger import get_logger

from lgl_plugin.runs.state import damage, describe
from lgl_plugin.runs.weights import read_tensors
from lgl_plugin.utils.files import sync
from lgl_plugin.utils.speechbrain_internals import (
    checkpoint_folders,
    read_checkpoints,
)

logger = get_logger(__name__)

CHECKSUMS = "checksums.json"
FROZEN = ".frozen"  # suffix of the file with the checksum of frozen weights


class WholeCheckpointer(Checkpointer):
    """SpeechBrain's Checkpointer, with atomic and checked checkpoints.

    SpeechBrain writes a checkpoint in place: after a full disk or a kill it
    would find the incomplete checkpoint first, and fail to load it. Here a
    checkpoint is written to another folder, synced and moved. A checkpoint
    that was damaged since is skipped, with a warning, and the previous one is
    used. A save that fails raises OSError, and the previous checkpoint stays.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.is_whole = {}  # by path, so that each checkpoint is read once

    def list_checkpoints(self) -> list[Checkpoint]:
        """Returns the checkpoints that are undamaged."""
        return read_checkpoints(self._whole_folders())

    @main_process_only
    def _whole_folders(self) -> list[pathlib.Path]:
        """Lists the folders of whole checkpoints, the same in all processes.

        If each process looked for itself, a process whose disk fails for a
        moment would resume from another epoch.
        """
        return [p for p in checkpoint_folders(self) if self._check(p)]

    def _check(self, path: pathlib.Path) -> bool:
        """Tells whether a checkpoint is whole; warns once if it is not."""
        if path in self.is_whole:
            return self.is_whole[path]
        try:
            text = (path / CHECKSUMS).read_text(encoding="utf-8")
            wrong = damage(path, json.loads(text))
        except OSError as error:  # such as a disk that cannot be read now
            logger.warning("%s is not used: %s", path, error)
            return False
        except (ValueError, TypeError, AttributeError, LookupError):
            wrong = [f"{CHECKSUMS} has been altered"]
        if wrong:
            logger.warning("%s is not used: %s", path, "; ".join(wrong))
        self.is_whole[path] = not wrong
        return not wrong

    def save_checkpoint(
        self, meta: dict | None = None, **kwargs: Any
    ) -> Checkpoint | None:
        """Saves a checkpoint to a temporary folder and moves it into place."""
        # SpeechBrain resumes from the checkpoint with the latest time. So each
        # gets a later time than the others, even if the clock was put back.
        times = [c.meta["unixtime"] for c in self.list_checkpoints()]
        meta = {"unixtime": max([time.time(), *(t + 1e-3 for t in times)])} | (
            meta or {}
        )
        folder: pathlib.Path = self.checkpoints_dir  # type: ignore[has-type]
        if kwargs.get("name") is None:
            stamp = time.strftime("%Y-%m-%d+%H-%M-%S")
            kwargs["name"] = f"{stamp}+{time.time_ns() % 10**9:09d}"
        unfinished = folder / "unfinished"
        if if_main_process():
            shutil.rmtree(unfinished, ignore_errors=True)  # left by a kill
        # SpeechBrain would log the name of the folder that is moved below.
        kwargs["verbosity"] = logging.DEBUG
        self.checkpoints_dir = unfinished
        try:
            saved = super().save_checkpoint(meta, **kwargs)
            if saved is not None:
                self._seal(saved.path)
                target = folder / saved.path.name
                os.replace(saved.path, target)
                sync(folder)
        except (OSError, RuntimeError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            before = "The one before it is whole"
            if not any(folder.glob("CKPT*")):
                before = "There is none before it, so the phase begins anew"
            raise OSError(
                f"a checkpoint cannot be written to {folder}{_free(folder)} "
                f"({error}). {before}: make room, or the folder writable, and "
                "start the same command again."
            ) from error
        finally:
            self.checkpoints_dir = folder
        if saved is None:  # only the main process has it
            ddp_barrier()
            return None
        self.is_whole[target] = True
        logger.info("Saved a checkpoint in %s", target)
        ddp_barrier()  # no rank looks for the checkpoint before the move
        files = {k: target / f.name for k, f in saved.paramfiles.items()}
        return saved._replace(path=target, paramfiles=files)

    def save_and_keep_only(self, *args: Any, **kwargs: Any) -> None:
        """Saves a checkpoint, then deletes those that are not to be kept."""
        # SpeechBrain adds to its default list at each call, and reads all
        # checkpoints for each entry: a run's saves would become ever slower.
        kwargs.setdefault("importance_keys", [])
        super().save_and_keep_only(*args, **kwargs)

    @staticmethod
    def _seal(folder: pathlib.Path) -> None:
        """Writes the checksums of a checkpoint's files and syncs them all."""
        files = describe(folder, list(folder.iterdir()))
        with open(folder / CHECKSUMS, "w", encoding="utf-8") as out:
            json.dump(files, out, indent=1)
        # `atomic_write` is not needed: the whole folder is synced, then moved.
        for path in [*folder.iterdir(), folder]:
            sync(path)


def _free(folder):
    """Says how much disk space is free; "" if that is not known."""
    with contextlib.suppress(OSError):
        return f", where {shutil.disk_usage(folder).free / 1e6:.1f} MB are free"
    return ""


def hooks_without(
    frozen: Collection[str], module: torch.nn.Module
) -> tuple[Callable, Callable]:
    """Returns hooks that save and load a module without its frozen weights.

    A speech model's frozen weights take gigabytes and never change; the module
    of a resumed run has them already. A file beside the checkpoint has their
    checksum: resuming with other frozen weights raises ValueError.
    """
    tensors, digest = module.state_dict(), hashlib.sha256()
    for name in sorted(frozen):
        digest.update(tensors[name].cpu().numpy().tobytes())
    frozen_sha256 = digest.hexdigest()

    @main_process_only
    def save(module, path):
        tensors = module.state_dict()
        torch.save({n: tensors[n] for n in tensors if n not in frozen}, path)
        path.with_suffix(FROZEN).write_text(frozen_sha256)

    def load(module, path, end_of_epoch):
        beside = path.with_suffix(FROZEN)
        if beside.exists() and beside.read_text() != frozen_sha256:
            raise ValueError(
                f"{path}: the frozen weights are others than those that this "
                "training began with. Bring the model back that it is made "
                "from, or set another --output_folder."
            )
        weights = module.state_dict()
        weights = {name: weights[name] for name in frozen}
        module.load_state_dict({**weights, **read_tensors(path)})

    return save, load
