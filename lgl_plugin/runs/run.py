"""A run's folder: which steps are done, what they left, its metrics.

A step is recorded in `state.json` last, when all that it wrote is whole, so
the same command after an interruption goes on where it stopped. What has been
damaged since is found at the next start and made again.
"""

import contextlib
import hashlib
import json
import math
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Iterable
from typing import Any

from speechbrain.utils.distributed import main_process_only
from speechbrain.utils.logger import get_logger

from lgl_plugin.runs.differences import changes, flatten, identity
from lgl_plugin.runs.lock import lock_folder
from lgl_plugin.runs.metrics_log import METRICS, TRUE_LABELS
from lgl_plugin.runs.state import (
    ADAPTATION,
    STATE,
    damage,
    describe,
    digest,
    read_state,
    write_state,
)
from lgl_plugin.runs.weights import ENCODER
from lgl_plugin.utils.distributed import broadcast, from_main, world_size
from lgl_plugin.utils.files import (
    append_line,
    atomic_write,
    checksum,
    written_files,
)

logger = get_logger(__name__)

# Files below a step's folder: trial scores, the last gated epoch, the means of
# the clusters.
SCORES, GATE, CENTROIDS = "scores.npz", "gate.npz", "centroids.npy"
# The step of `ceiling.py`, which has Stage II's settings and none of its steps.
CEILING = "ceiling"


class Run:
    """A run folder: its finished steps, what they left, and its metrics.

    `state.json` holds, beside each stage's settings and the results of the
    `done` steps: size and SHA-256 of the `files` that a step left; its
    `sources`, a checksum of what it was made from; checksums of each stage's
    `inputs` from outside the folder; why a step has `failed`; and how large
    the `batches` of all processes were when a stage was begun.

    Arguments
    ---------
    folder : str or pathlib.Path
        The yaml's output_folder.
    stage : int
        1 or 2; both stages share a folder.
    settings : dict
        The stage's settings, see `plain_settings`.

    Attributes
    ---------
    plan : list of str
        All steps in their order, also those of the other stage as far as its
        settings are known; the screen counts by it.

    Raises
    ------
    ValueError
        If the folder holds steps of this stage made with settings that give
        another result, see `differences.identity`. Or if `state.json` is
        damaged.
    RuntimeError
        If another process writes there.
    OSError
        If the folder cannot be written.

    Example
    -------
    >>> run = Run(getfixture("tmp_path"), 1, {"lr": 0.001, "num_workers": 0})
    >>> run.step("stage1", lambda folder: {"epochs": 3})
    {'epochs': 3}
    >>> run = Run(run.folder, 1, {"lr": 0.001, "num_workers": 8})
    >>> run.step("stage1", lambda folder: {"epochs": 99})
    {'epochs': 3}
    """

    def __init__(
        self, folder: str | pathlib.Path, stage: int, settings: dict
    ) -> None:
        self.folder = pathlib.Path(folder)
        self.stage = stage
        self.key = f"stage {stage}"  # of the settings and inputs on record
        from_main(lock_folder, self.folder)
        state = from_main(self._read)
        self.done = state["done"]
        self.settings = state["settings"]
        self.files = state["files"]
        self.sources = state["sources"]
        self.inputs = state["inputs"]
        self.failed = state["failed"]
        self.batches = state.get("batches", {})  # versions before had none
        self._check_settings(settings)
        self._check_metrics(state.get("metrics"))
        self.plan = planned_steps(self.settings)

    def _read(self):
        """Reads the folder's state; that of a new one is empty."""
        with contextlib.suppress(FileNotFoundError):
            return read_state(self.folder)
        if (self.folder / METRICS).exists():
            raise ValueError(
                f"{self.folder} holds the metrics of a run but no state.json, "
                "so it cannot be told which steps are done. Bring that back, "
                "or set another --output_folder."
            )
        names = ("done", "settings", "files", "sources", "inputs", "failed")
        return {name: {} for name in names}

    def _check_settings(self, settings):
        """Refuses settings with which the stage's steps would differ."""
        # Steps of both would be shown as one run's.
        adapts = ADAPTATION in self.settings
        if self.settings and adapts != (self.key == ADAPTATION):
            kind = "an adaptation" if adapts else "a training run"
            raise ValueError(f"{self.folder} holds {kind}: name another folder")
        before = self.settings.get(self.key, settings)
        begun = [step for step in self._begun() if step != "baselines"]
        warning = self._other_batch(settings.get("batch_size", 0), begun)
        alike = () if warning else {"batch_size"}
        differences = changes(before, settings, alike)
        more = _more_rounds(before, settings, alike)
        if differences and begun and not more:
            advice = "set another --output_folder"
            if self.stage == 2:
                last = stage1_steps(self.settings)[-1]
                advice += (
                    f" with --pretrained_encoder={self.folder / last}, and "
                    "Stage I need not be trained again"
                )
            raise ValueError(
                f"{self.folder} holds steps of stage {self.stage} with other "
                f"settings ({', '.join(begun)}). Go on with those, or "
                f"{advice}.\n" + "\n".join(differences)
            )
        if warning:
            logger.warning(warning)
        self.settings[self.key] = settings
        if not begun:  # nothing was made of what was given then
            self.inputs.pop(self.key, None)

    def _other_batch(self, batch_size, begun):
        """Returns a warning if the batch of all processes was another.

        Fewer processes may go on with a larger batch_size. If they keep
        batch_size, the batch of all is smaller than the lr was chosen for.
        """
        batch, processes = batch_size * world_size(), world_size()
        if not begun:
            self.batches[self.key] = batch
        before = self.batches.setdefault(self.key, batch)
        if batch == before:
            return ""
        advice = f"{processes} processes cannot make that batch"
        if before % processes == 0:
            advice = f"--batch_size={before // processes} makes that batch"
        return (
            f"batch_size: the batch of all processes is {batch}, at the same "
            f"lr. Stage {self.stage} was begun with a batch of {before} in "
            f"all: {advice}."
        )

    def _begun(self):
        """Lists this stage's steps that are done or have a checkpoint."""
        trained = [
            path.parent.relative_to(self.folder).as_posix()
            # Not at any depth: debug/stage1, say, is no step of this run.
            for pattern in ("*/checkpoints", "iter*/*/checkpoints")
            for path in self.folder.glob(pattern)
            if any(path.iterdir())
        ]
        return [
            name
            for name in dict.fromkeys([*self.done, *trained])
            if stage_of(name) == self.key
            # Changed settings do the ceiling again, by its source.
            and not (name.startswith("export/") or is_ceiling(name))
        ]

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
        """Returns size and checksum of metrics.jsonl, or of its beginning."""
        path = self.folder / METRICS
        data = path.read_bytes()[:size] if path.exists() else b""
        return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def record_input(
        self,
        name: str,
        path: str | pathlib.Path,
        content: Callable[..., str] = checksum,
    ) -> None:
        """Puts a file or folder from outside on record, by its content.

        That is what `content` returns of the path. ValueError if the stage was
        begun with other content under the name of this setting; the path may
        differ.
        """
        inputs = self.inputs.setdefault(self.key, {})
        now = from_main(content, path)
        if inputs.setdefault(name, now) != now:
            raise ValueError(
                f"{name}: {path} is not what it was when stage {self.stage} "
                f"of {self.folder} began. Bring that back, or set "
                "another --output_folder."
            )

    def step(
        self,
        name: str,
        work: Callable[[pathlib.Path], dict | None],
        source: str | None = None,
    ) -> dict:
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
        # A step that is new has no source on record.
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
        # Counted as `lgl status` does.
        counted = [step for step in self.plan if not step.startswith("export/")]
        if name in counted:
            number = counted.index(name) + 1
            logger.info("step %d of %d: %s", number, len(counted), name)
        else:  # an export, or of a recipe that has other steps
            logger.info("%s begins", name)
        old = self.files.get(name, {}) if renewed else {}
        from_main(self._clear, folder, renewed, old)
        self.sources[name] = source
        for record in (self.done, self.files, self.failed):
            record.pop(name, None)
        self.save()
        started = time.perf_counter()
        with written_files() as written:
            result = work(folder) or {}
        # Only the main process writes: when the others have its answer, all
        # its files are whole.
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
    def _clear(folder, renewed, old):
        """Makes a step's folder; what was made of another source goes."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in old:  # a step that now leaves less would seem to have it
            (folder / name).unlink(missing_ok=True)
        for part in folder.glob(".*.part"):  # of a process that was killed
            part.unlink()
        checkpoints = folder / "checkpoints"
        if renewed and checkpoints.exists():
            # The folder may be a link to another disk, which rmtree refuses:
            # the old checkpoints behind it would pass for the new ones.
            target = checkpoints.resolve()
            shutil.rmtree(target)
            if checkpoints.is_symlink():
                target.mkdir()

    def checksum(self, name: str) -> str | None:
        """Returns one checksum over what a step left; None without a record."""
        return digest(self.files[name]) if name in self.files else None

    def identity(self) -> str:
        """Returns one checksum over what changes the stage's result."""
        settings = sorted(flatten(identity(self.settings[self.key])))
        return digest([settings, self.inputs.get(self.key)])

    @main_process_only
    def save(self) -> None:
        """Writes `state.json`."""
        state = {
            "settings": self.settings,
            "inputs": self.inputs,
            "sources": self.sources,
            "done": self.done,
            "failed": self.failed,
            "files": self.files,
            "batches": self.batches,
            "metrics": self._metrics(),
        }
        write_state(self.folder, state)

    @main_process_only
    def log(self, **record: Any) -> None:
        """Appends a record to metrics.jsonl; a number not finite is null."""
        for name, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                record[name] = None
        append_line(self.folder / METRICS, json.dumps(record))


def _more_rounds(before, settings, alike):
    """Says whether settings of Stage II ask for more rounds and nothing else.

    Those of the names `alike` may differ.

    Not where the last round has an encoder or a fine-tuning of its own: the
    round that was the last would have to be done again without.
    """
    numbers = [each.get("n_iterations", 0) for each in (before, settings)]
    last_differs = settings.get("new_last_encoder") is not None
    last_differs = last_differs or settings.get("large_margin_epochs")
    same = not changes({**before, "n_iterations": numbers[1]}, settings, alike)
    return same and numbers[0] < numbers[1] and not last_differs


def planned_steps(settings: dict[str, dict]) -> list[str]:
    """Lists the steps that settings, by "stage 1" and "stage 2", ask for."""
    steps = []
    if "stage 1" in settings:
        steps += ["baselines"]
        for name in stage1_steps(settings):
            steps += [name, f"export/{name}"]
    stage2 = settings.get("stage 2", {})
    n_rounds = stage2.get("n_iterations", 0)
    for number in range(1, n_rounds + 1):
        names = ["embeddings", "labels", "classifier", "gated"]
        if number == n_rounds and stage2.get("large_margin_epochs"):
            names.append("large_margin")
        steps += [f"iter{number}/{name}" for name in names]
        steps.append(f"export/iter{number}")
    return steps


def stage1_steps(settings: dict[str, dict]) -> list[str]:
    """Lists Stage I's steps that train; Stage II starts from the last one."""
    ssps = settings.get("stage 1", {}).get("ssps_epochs")
    return ["stage1", "ssps"] if ssps else ["stage1"]


def encoder_kind(settings: dict, number: int) -> str:
    """Names the setting that a round's encoder is made by, 0 for Stage I's."""
    last = number == settings.get("n_iterations")
    wide = last and settings.get("new_last_encoder")
    return "new_last_encoder" if wide else "new_encoder"


def encoder_steps(folder: pathlib.Path, state: dict) -> list[str]:
    """Lists the done steps of a run that left an encoder, the latest last."""
    found = [
        name
        for name in state["done"]
        if not name.startswith("export") and (folder / name / ENCODER).exists()
    ]
    # `done` ends with a step that was done again, wherever its place is.
    plan = planned_steps(state["settings"])
    return sorted(
        found, key=lambda name: plan.index(name) if name in plan else -1
    )


def round_of(step: str) -> int:
    """Returns the number of the round that a step is of, 0 for Stage I."""
    found = re.match(r"iter(\d+)(/|$)", step)
    return int(found[1]) if found else 0


def stage_of(step: str) -> str:
    """Returns the name of a step's stage, as its settings have it."""
    second = round_of(step) or is_ceiling(step)
    return "stage 2" if second else "stage 1"


def is_ceiling(step: str) -> bool:
    """Tells whether a step is that of `ceiling.py`, or within it."""
    return step.split("/")[0] == CEILING


def step_of(record: dict) -> str:
    """Returns the step of the run that a record of metrics.jsonl belongs to."""
    phase = record["phase"].removeprefix("after ")
    if record["stage"] == 0:  # of neither stage
        return CEILING if phase == TRUE_LABELS else "baselines"
    if record["stage"] == 1:
        return "ssps" if phase == "ssps" else "stage1"
    phase = "labels" if phase == "clusters" else phase
    return f"iter{record['iteration']}/{phase}"


def fork(
    source: str | pathlib.Path, target: str | pathlib.Path, steps: Iterable[str]
) -> None:
    """Begins a run with steps that another one has done, named by `steps`.

    Two runs that differ late, such as with and without the gate, then share
    the steps before. Stage II's settings are those that the new run starts
    with: the caller must ensure that the kept steps are the same under them. A
    target that exists stays as it is; ValueError if the source has not done one
    of the steps.
    """
    source, target, steps = pathlib.Path(source), pathlib.Path(target), [*steps]
    if (target / STATE).exists():
        return
    state = read_state(source)
    missing = [step for step in steps if step not in state["done"]]
    if missing:
        raise ValueError(f"{source} has not done {', '.join(missing)} yet")
    target.mkdir(parents=True, exist_ok=True)
    leave = shutil.ignore_patterns("checkpoints")
    for step in steps:
        shutil.copytree(
            source / step, target / step, ignore=leave, dirs_exist_ok=True
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
    for name in ("settings", "inputs", "batches"):
        state.get(name, {}).pop("stage 2", None)
    state["failed"] = {}
    state.pop("metrics", None)
    write_state(target, state)
