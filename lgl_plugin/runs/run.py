"""A run's folder: which steps are done, what they left, its metrics.

A step is recorded in `state.json` last, when all that it wrote is whole, so
the same command after an interruption goes on where it stopped. What has been
damaged since is found at the next start and made again.
"""

import contextlib
import hashlib
import json
import math
import os
import pathlib
import shutil
import time

from speechbrain.utils.distributed import main_process_only
from speechbrain.utils.logger import get_logger

from lgl_plugin.runs.lock import lock_folder
from lgl_plugin.runs.state import (
    damage,
    describe,
    digest,
    read_state,
    write_state,
)
from lgl_plugin.utils.distributed import broadcast, from_main
from lgl_plugin.utils.files import (
    atomic_write,
    checksum,
    explain_full_disk,
    written_files,
)

logger = get_logger(__name__)

METRICS = "metrics.jsonl"


class Run:
    """A run folder: its finished steps, what they left, and its metrics.

    `state.json` holds, beside each stage's settings and the results of the
    `done` steps: size and SHA-256 of the `files` that a step left; its
    `sources`, a checksum of what it was made from; checksums of each stage's
    `inputs` from outside the folder; and why a step has `failed`.

    Arguments
    ---------
    folder : str or pathlib.Path
        The yaml's output_folder.
    stage : int
        1 or 2; both stages share a folder.
    settings : dict
        The stage's settings, see `plain_settings`.

    Raises
    ------
    ValueError
        If the folder holds steps of this stage made with other settings:
        they would pass for results of these. Or if `state.json` is damaged.
    RuntimeError
        If another process writes there.
    OSError
        If the folder cannot be written.

    Example
    -------
    >>> run = Run(getfixture("tmp_path"), 1, {"lr": 0.001})
    >>> run.step("stage1", lambda folder: {"epochs": 3})
    {'epochs': 3}
    >>> run = Run(run.folder, 1, {"lr": 0.001})  # the same command again
    >>> run.step("stage1", lambda folder: {"epochs": 99})
    {'epochs': 3}
    """

    def __init__(self, folder, stage, settings):
        self.folder = pathlib.Path(folder)
        self.stage = stage
        from_main(lock_folder, self.folder)
        state = from_main(self._read)
        self.done = state["done"]
        self.settings = state["settings"]
        self.files = state["files"]
        self.sources = state["sources"]
        self.inputs = state["inputs"]
        self.failed = state["failed"]
        self._check_settings(settings)
        self._check_metrics(state.get("metrics"))

    def _read(self):
        """The folder's state; that of a new one is empty."""
        with contextlib.suppress(FileNotFoundError):
            return read_state(self.folder)
        if (self.folder / METRICS).exists():
            raise ValueError(
                f"{self.folder} holds the metrics of a run but no state.json, "
                "so it cannot be told which steps are done. Bring that back, "
                "set another --output_folder, or delete this one."
            )
        names = ("done", "settings", "files", "sources", "inputs", "failed")
        return {name: {} for name in names}

    def _check_settings(self, settings):
        before = self.settings.setdefault(f"stage {self.stage}", settings)
        if before != settings:
            changes = [
                f"{key}: was {before.get(key)}, is {settings.get(key)}"
                for key in {**before, **settings}
                if before.get(key) != settings.get(key)
            ]
            raise ValueError(
                f"{self.folder} holds a run of stage {self.stage} with other "
                "settings; set another --output_folder, or delete that one.\n"
                + "\n".join(changes)
            )

    def _check_metrics(self, before):
        """Warns if what steps logged is no longer there."""
        if before and before != self._metrics(before["bytes"]):
            logger.warning(
                "%s has been altered: figures of steps that are done may be "
                "missing or wrong in the report and its warnings. Nothing "
                "that trains reads it.",
                self.folder / METRICS,
            )

    def _metrics(self, size=None):
        """Size and checksum of metrics.jsonl, or of its beginning."""
        path = self.folder / METRICS
        found = path.read_bytes()[:size] if path.exists() else b""
        checksum = hashlib.sha256(found).hexdigest()
        return {"bytes": len(found), "sha256": checksum}

    def given(self, name, path):
        """Puts a file from outside on record; another is refused.

        Arguments
        ---------
        name : str
            Of the setting that names it.
        path : str or pathlib.Path
            The file.

        Raises
        ------
        ValueError
            If it is not the one that this stage of the run was begun with.

        Example
        -------
        >>> run = Run(getfixture("tmp_path"), 1, {})
        >>> trials = run.folder / "trials.txt"
        >>> _ = trials.write_text("1 a.wav b.wav")
        >>> run.given("verification_file", trials)
        >>> _ = trials.write_text("0 a.wav b.wav")
        >>> run.given("verification_file", trials)
        Traceback (most recent call last):
        ValueError: verification_file: ...trials.txt is not what it was when...
        """
        inputs = self.inputs.setdefault(f"stage {self.stage}", {})
        now = from_main(checksum, path)
        if inputs.setdefault(name, now) != now:
            raise ValueError(
                f"{name}: {path} is not what it was when stage {self.stage} "
                f"of {self.folder} began. Bring that file back, or set "
                "another --output_folder."
            )

    def step(self, name, work, source=None):
        """Does a step, unless it is done and all that it left is whole.

        A step is done again if a file that it left is missing, truncated or
        altered, or if it was made from something else than `source`. Where
        only the files suffered, training goes on from its last checkpoint.
        If the same files come of it, the steps after it still hold.

        Arguments
        ---------
        name : str
            Also the step's sub-folder.
        work : callable
            Takes the folder, returns a dict of plain values to remember. With
            a key "failed", which says why, the step is not done: the next
            start tries it again.
        source : str, optional
            A checksum of what the step is made from.

        Returns
        -------
        dict
            What `work` returned, now or in an earlier process.
        """
        folder = self.folder / name
        # Runs of earlier versions have no records: what is done is done.
        renewed = source != self.sources.get(name, source)
        wrong = from_main(damage, folder, self.files.get(name, {}))
        if name in self.done and not (renewed or wrong):
            logger.info("%s is done, going on", name)
            return self.done[name]
        if name in self.done and wrong:
            logger.warning("%s is done again: %s", name, "; ".join(wrong))
        elif renewed:
            logger.warning(
                "%s is done again: what it was made from has changed", name
            )
        logger.info("%s begins", name)
        from_main(self._clear, folder, renewed)
        self.sources[name] = source
        for record in (self.done, self.files, self.failed):
            record.pop(name, None)
        self.save()
        started = time.perf_counter()
        with written_files() as written:
            result = work(folder) or {}
        # Of several processes the main one writes: when the others have its
        # answer, all its files are whole.
        result, files = broadcast((result, describe(folder, written)))
        if "failed" in result:
            self.failed[name] = result["failed"]
        else:
            self.done[name], self.files[name] = result, files
        self.save()
        seconds = time.perf_counter() - started
        logger.info(
            "%s %s after %.0f s",
            *(name, "failed" if name in self.failed else "is done", seconds),
        )
        return result

    @staticmethod
    def _clear(folder, renewed):
        """Makes a step's folder; what was trained on another source goes."""
        folder.mkdir(parents=True, exist_ok=True)
        for part in folder.glob(".*.part"):  # of a process that was killed
            part.unlink()
        if renewed:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    def checksum(self, name):
        """One checksum over what a step left; None if it is not on record."""
        return digest(self.files[name]) if name in self.files else None

    @main_process_only
    def save(self):
        """Writes `state.json`."""
        state = {
            "settings": self.settings,
            "inputs": self.inputs,
            "sources": self.sources,
            "done": self.done,
            "failed": self.failed,
            "files": self.files,
            "metrics": self._metrics(),
        }
        write_state(self.folder, state)

    @main_process_only
    def log(self, **record):
        """Appends an object to metrics.jsonl; null is what is not finite."""
        for name, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                record[name] = None
        path = self.folder / METRICS
        with explain_full_disk(path), open(path, "a+b") as metrics:
            # A line torn by a crash must not swallow this one.
            if metrics.tell():
                metrics.seek(-1, os.SEEK_END)
                if metrics.read(1) != b"\n":
                    metrics.write(b"\n")
            metrics.write(json.dumps(record).encode() + b"\n")


def step_of(record):
    """The step of the run that a record of metrics.jsonl belongs to.

    Example
    -------
    >>> step_of({"stage": 2, "iteration": 1, "phase": "after gated"})
    'iter1/gated'
    >>> step_of({"stage": 0, "phase": "untrained"})
    'baselines'
    """
    if record["stage"] < 2:
        return ("baselines", "stage1")[record["stage"]]
    phase = record["phase"].removeprefix("after ")
    phase = "labels" if phase == "clusters" else phase
    return f"iter{record['iteration']}/{phase}"


def fork(source, target, steps):
    """Begins a run with steps that another one has done.

    Two runs that part late, such as with and without the gate, then share
    what came before. Stage II's settings are those that the new run is
    started with: whoever forks answers for the kept steps being the same
    under them.

    Arguments
    ---------
    source : str or pathlib.Path
        A run folder.
    target : str or pathlib.Path
        The new one. If it exists it is left as it is.
    steps : iterable of str
        Names of steps to take over, as in `state.json`.

    Raises
    ------
    ValueError
        If the source has not done one of them.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> run = Run(folder / "gated", 1, {"lr": 0.001})
    >>> _ = run.step("stage1", lambda folder: {})
    >>> fork(folder / "gated", folder / "ungated", ["stage1"])
    >>> Run(folder / "ungated", 1, {"lr": 0.001}).done
    {'stage1': {}}
    """
    source, target = pathlib.Path(source), pathlib.Path(target)
    if (target / "state.json").exists():
        return
    state = read_state(source)
    missing = [step for step in steps if step not in state["done"]]
    if missing:
        raise ValueError(f"{source} has not done {', '.join(missing)} yet")
    target.mkdir(parents=True, exist_ok=True)
    for step in steps:
        shutil.copytree(
            source / step,
            target / step,
            ignore=shutil.ignore_patterns("checkpoints"),
            dirs_exist_ok=True,
        )
    for path in [*source.glob("manifest.csv*"), source / "bad_files.txt"]:
        if path.exists():
            shutil.copy(path, target)
    metrics = source / METRICS
    lines = metrics.read_text("utf-8").splitlines() if metrics.exists() else []
    with atomic_write(target / METRICS) as out:
        for line in lines:
            with contextlib.suppress(ValueError):  # torn by a crash
                if step_of(json.loads(line)) in steps:
                    out.write(line + "\n")
    for name in ("done", "files", "sources"):
        before = state[name]
        state[name] = {step: before[step] for step in steps if step in before}
    for name in ("settings", "inputs"):
        state[name].pop("stage 2", None)
    state["failed"] = {}
    state.pop("metrics", None)
    write_state(target, state)
