"""A run's folder: its steps, their files and results, and the metrics.

A step is recorded in `state.json` after all its files are written. So after an
interruption the same command continues where it stopped. The next start finds
files that were damaged since, and repeats their step.
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

# Files in a step's folder: trial scores, the last gated epoch, cluster means.
SCORES, GATE, CENTROIDS = "scores.npz", "gate.npz", "centroids.npy"
# The step of `ceiling.py`, which has Stage II's settings but not its steps.
CEILING = "ceiling"


class Run:
    """A run folder: its finished steps, their files, and its metrics.

    `state.json` holds each stage's `settings` and the results of the `done`
    steps. It also holds: size and SHA-256 of the `files` that a step wrote; its
    `sources`, a checksum of what the step was made from; checksums of each
    stage's `inputs` from outside the folder; why a step has `failed`; and the
    size of `batches`, over all processes, when a stage was begun.

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
        All steps in their order, with those of the other stage if its settings
        are known. Log messages count steps by this list.

    Raises
    ------
    ValueError
        If the folder holds steps of this stage made with settings that give
        another result, see `differences.identity`; or if `state.json` is
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
        self.key = f"stage {stage}"  # key of this stage in `state.json`
        from_main(lock_folder, self.folder)
        state = from_main(self._read)
        self.done = state["done"]
        self.settings = state["settings"]
        self.files = state["files"]
        self.sources = state["sources"]
        self.inputs = state["inputs"]
        self.failed = state["failed"]
        self.batches = state.get("batches", {})  # older versions had none
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
        # Otherwise steps of a training and an adaptation would count as one
        # run's.
        adapts = ADAPTATION in self.settings
        if self.settings and adapts != (self.key == ADAPTATION):
            kind = "an adaptation" if adapts else "a training run"
            raise ValueError(f"{self.folder} holds {kind}: name another folder")
        before = self.settings.get(self.key, settings)
        begun = [step for step in self._begun() if step != "baselines"]
        batch = settings.get("batch_size", 0) * world_size()
        # Versions before kept no batches: those of as many processes as now.
        recorded = before.get("batch_size", 0) * world_size()
        first = self.batches.get(self.key, recorded)
        alike = {"batch_size"} if batch == first else ()
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
        if not begun and (differences or not self._ceiling_begun()):
            first = batch
        elif batch == first:
            # The batch_size of the beginning stays on record: another one
            # would change `identity`, and steps would be done again.
            settings = _with_batch_size_of(before, settings)
        else:
            self._warn_of_batch(batch, first)
        self.batches[self.key] = first
        self.settings[self.key] = settings
        if not begun:  # nothing was made from the inputs on record
            self.inputs.pop(self.key, None)

    def _ceiling_begun(self):
        """Tells whether `ceiling.py`, which counts as no step, has begun."""
        folder = self.folder / CEILING / "checkpoints"
        return self.stage == 2 and folder.is_dir() and any(folder.iterdir())

    def _warn_of_batch(self, batch, first):
        """Warns that the batch of all processes does not suit the lr.

        Fewer processes can continue with a larger batch_size.
        """
        processes = world_size()
        advice = f"{processes} processes cannot make that batch"
        if first % processes == 0:
            advice = f"--batch_size={first // processes} makes that batch"
        logger.warning(
            "batch_size: the batch of all processes is %d, at the same lr. "
            "Stage %d was begun with a batch of %d in all: %s.",
            *(batch, self.stage, first, advice),
        )

    def _begun(self):
        """Lists this stage's steps that are done or have a checkpoint."""
        trained = [
            path.parent.relative_to(self.folder).as_posix()
            # Not at any depth: debug/stage1, for example, is no step of a run.
            for pattern in ("*/checkpoints", "iter*/*/checkpoints")
            for path in self.folder.glob(pattern)
            if any(path.iterdir())
        ]
        return [
            name
            for name in dict.fromkeys([*self.done, *trained])
            if stage_of(name) == self.key
            # With changed settings, `ceiling.py` does its step again.
            and not (name.startswith("export/") or is_ceiling(name))
        ]

    def _check_metrics(self, before):
        """Warns if records of the metrics were altered or are missing."""
        if before and before != self._metrics(before["bytes"]):
            logger.warning(
                "%s has been altered: figures of steps that are done may be "
                "missing or wrong in the report and its warnings. Nothing "
                "that trains reads it.",
                self.folder / METRICS,
            )

    def _metrics(self, size=None):
        """Returns size and checksum of metrics.jsonl or its first bytes."""
        path = self.folder / METRICS
        data = path.read_bytes()[:size] if path.exists() else b""
        return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def record_input(
        self,
        name: str,
        path: str | pathlib.Path,
        content: Callable[..., str] = checksum,
    ) -> None:
        """Records the content of a file or folder from outside the run.

        The content is what `content` returns of the path, by default a
        checksum; `name` is the setting. Raises ValueError if the stage was
        begun with other content. The path may differ.
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
        """Does a step, unless it is done and its files are undamaged.

        A step is done again if one of its files is missing, truncated or
        altered, or if it was made from another `source`. If only files are
        damaged, training continues from its last checkpoint. If the repeated
        step writes the same files, later steps stay valid.

        Arguments
        ---------
        name : str
            Also the step's sub-folder.
        work : callable
            Takes the folder, and returns a dict of plain values to record. If
            the dict has a key "failed", with the reason, the step is not done
            and the next start tries it again.
        source : str, optional
            A checksum of what the step is made from.

        Returns
        -------
        dict
            What `work` returned, now or in an earlier process.
        """
        folder = self.folder / name
        # A new step has no source on record, and is not renewed.
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
        # Exports are not counted, as in `lgl status`.
        counted = [step for step in self.plan if not step.startswith("export/")]
        if name in counted:
            number = counted.index(name) + 1
            logger.info("step %d of %d: %s", number, len(counted), name)
        else:  # an export, or a step of a recipe with other steps
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
        # The broadcast also waits for the main process, which alone writes: the
        # other processes must not read its files before they are whole.
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
        """Makes a step's folder; removes what is of another source."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in old:  # the repeated step may write fewer files
            (folder / name).unlink(missing_ok=True)
        for part in folder.glob(".*.part"):  # of a process that was killed
            part.unlink()
        checkpoints = folder / "checkpoints"
        if renewed and checkpoints.exists():
            # Resolved: the folder may be a link to another disk, which rmtree
            # refuses, and training would resume from the old checkpoints.
            target = checkpoints.resolve()
            shutil.rmtree(target)
            if checkpoints.is_symlink():
                target.mkdir()

    def checksum(self, name: str) -> str | None:
        """Returns one checksum over a step's files; None without a record."""
        return digest(self.files[name]) if name in self.files else None

    def identity(self) -> str:
        """Returns one checksum of settings and inputs that set the result."""
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
        """Appends a record to metrics.jsonl, with null for infinity and NaN."""
        for name, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                record[name] = None
        append_line(self.folder / METRICS, json.dumps(record))


def _with_batch_size_of(before, settings):
    """Returns plain settings with the batch_size of others."""
    kept = {**settings}
    for key in {"batch_size"} & before.keys():
        kept[key] = before[key]
    for key in {"dataloader_options"} & before.keys():
        kept[key] = _with_batch_size_of(before[key], settings[key])
    return kept


def _more_rounds(before, settings, alike):
    """Tells whether Stage II's settings differ only by more rounds.

    Settings named in `alike` may differ. False if the last round has an encoder
    or a fine-tuning of its own: the round that was the last would have to be
    done again without it.
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
    """Names the setting that makes a round's encoder; Stage I is round 0."""
    last = number == settings.get("n_iterations")
    wide = last and settings.get("new_last_encoder")
    return "new_last_encoder" if wide else "new_encoder"


def encoder_steps(folder: pathlib.Path, state: dict) -> list[str]:
    """Lists the done steps of a run that wrote an encoder, latest last."""
    steps = [
        name
        for name in state["done"]
        if not name.startswith("export") and (folder / name / ENCODER).exists()
    ]
    # Sorted, because a step that was done again is the last in `done`.
    plan = planned_steps(state["settings"])
    return sorted(
        steps, key=lambda name: plan.index(name) if name in plan else -1
    )


def round_of(step: str) -> int:
    """Returns the number of a step's round, 0 for Stage I."""
    match = re.match(r"iter(\d+)(/|$)", step)
    return int(match[1]) if match else 0


def stage_of(step: str) -> str:
    """Returns the key of a step's stage in the settings."""
    second = round_of(step) or is_ceiling(step)
    return "stage 2" if second else "stage 1"


def is_ceiling(step: str) -> bool:
    """Tells whether a step is that of `ceiling.py`, or a part of it."""
    return step.split("/")[0] == CEILING


def step_of(record: dict) -> str:
    """Returns the step that a record of metrics.jsonl belongs to."""
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
    """Begins a run with copies of the `steps` that another run has done.

    So runs that differ only in late steps, such as with and without the gate,
    share the earlier steps. The new run may start with other settings of
    Stage II: the caller must ensure that they do not change the copied steps. A
    target that is a run already stays as it is. Raises ValueError if the source
    has not done one of the steps.
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
            with contextlib.suppress(ValueError):  # a crash cut the line off
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
