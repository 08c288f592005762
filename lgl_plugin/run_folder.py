"""A run's folder: which steps are done, its metrics, its weights and labels.

A step is recorded in `state.json` last, when all that it wrote is whole, so
the same command after an interruption goes on where it stopped.
"""

import contextlib
import csv
import io
import json
import logging
import math
import os
import pathlib
import re
import shutil
import time
from array import array

import numpy as np
import torch
import yaml
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.distributed import (
    ddp_barrier,
    ddp_broadcast,
    if_main_process,
    main_process_only,
)
from speechbrain.utils.logger import get_logger

from lgl_plugin.files import atomic_write, write_json
from lgl_plugin.manifest import CONTROL, Strings

logger = get_logger(__name__)

METRICS = "metrics.jsonl"


class Run:
    """A run folder: its finished steps and its metrics.

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
        they would pass for results of these.

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
        self.state_file = self.folder / "state.json"
        self.done = {}
        self.settings = {}
        if self.state_file.exists():
            self.settings, self.done = read_state(self.folder)
        before = self.settings.setdefault(f"stage {stage}", settings)
        if before != settings:
            changes = [
                f"{key}: was {before.get(key)}, is {settings.get(key)}"
                for key in {**before, **settings}
                if before.get(key) != settings.get(key)
            ]
            raise ValueError(
                f"{self.folder} holds a run of stage {stage} with other "
                "settings; set another --output_folder, or delete that one.\n"
                + "\n".join(changes)
            )

    def step(self, name, work):
        """Does a step, unless it is done.

        Arguments
        ---------
        name : str
            Also the step's sub-folder.
        work : callable
            Takes the folder, returns a dict of plain values to remember.

        Returns
        -------
        dict
            What `work` returned, now or in an earlier process.
        """
        if name in self.done:
            logger.info("%s is done, going on", name)
            return self.done[name]
        logger.info("%s begins", name)
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        # Of several processes the main one writes: when the others have its
        # answer, all its files are whole.
        result = self.done[name] = ddp_broadcast(work(folder) or {})
        self.save()
        seconds = time.perf_counter() - started
        logger.info("%s is done after %.0f s", name, seconds)
        return result

    @main_process_only
    def save(self):
        """Writes `state.json`."""
        state = {"settings": self.settings, "done": self.done}
        write_json(self.state_file, state)

    @main_process_only
    def log(self, **record):
        """Appends an object to metrics.jsonl; null is what is not finite."""
        for name, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                record[name] = None
        with open(self.folder / METRICS, "a+b") as metrics:
            # A line torn by a crash must not swallow this one.
            if metrics.tell():
                metrics.seek(-1, os.SEEK_END)
                if metrics.read(1) != b"\n":
                    metrics.write(b"\n")
            metrics.write(json.dumps(record).encode() + b"\n")


def read_state(folder):
    """Reads a run's `state.json`.

    Arguments
    ---------
    folder : str or pathlib.Path
        The run folder.

    Returns
    -------
    settings : dict
        From "stage 1" and "stage 2" to their settings.
    done : dict
        From the steps done to what they returned.

    Raises
    ------
    FileNotFoundError
        If there is none.
    ValueError
        If it is damaged.

    Example
    -------
    >>> run = Run(getfixture("tmp_path"), 1, {"lr": 0.001})
    >>> _ = run.step("stage1", lambda folder: {"epochs": 3})
    >>> read_state(run.folder)
    ({'stage 1': {'lr': 0.001}}, {'stage1': {'epochs': 3}})
    """
    path = pathlib.Path(folder) / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        settings, done = state["settings"], state["done"]
        parts = [settings, done, *settings.values(), *done.values()]
        if not all(isinstance(part, dict) for part in parts):
            raise TypeError("settings and done are not objects of objects")
        if not all(re.fullmatch(r"[\w/-]+", step) for step in done):
            raise ValueError("a step has a name that none of ours has")
    except FileNotFoundError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is damaged: too deep") from error
    return settings, done


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
    settings, done = read_state(source)
    missing = [step for step in steps if step not in done]
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
    settings.pop("stage 2", None)
    done = {step: done[step] for step in steps}
    write_json(target / "state.json", {"settings": settings, "done": done})


class WholeCheckpointer(Checkpointer):
    """SpeechBrain's Checkpointer, but a checkpoint is whole or absent.

    SpeechBrain writes a checkpoint in place: after a full disk or a kill in
    the middle it would find the torn one first, and fail to load it.

    Raises
    ------
    OSError
        When a checkpoint cannot be written; the previous one stays.

    Example
    -------
    >>> model = torch.nn.Linear(2, 3)
    >>> folder = getfixture("tmp_path")
    >>> checkpointer = WholeCheckpointer(folder, {"model": model})
    >>> checkpointer.save_checkpoint().path.parent == folder
    True
    """

    def save_checkpoint(self, *args, **kwargs):
        """Saves beside the checkpoints, then moves it among them."""
        folder = self.checkpoints_dir
        if kwargs.get("name") is None:
            stamp = time.strftime("%Y-%m-%d+%H-%M-%S")
            kwargs["name"] = f"{stamp}+{time.time_ns() % 10**9:09d}"
        unfinished = folder / "unfinished"
        if if_main_process():
            shutil.rmtree(unfinished, ignore_errors=True)  # left by a kill
        kwargs["verbosity"] = logging.DEBUG  # it would name that folder
        self.checkpoints_dir = unfinished
        try:
            saved = super().save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError) as error:
            free = shutil.disk_usage(folder).free / 1e6
            shutil.rmtree(unfinished, ignore_errors=True)
            raise OSError(
                f"a checkpoint cannot be written to {folder}, where {free:.1f} "
                f"MB are free ({error}). The one before it is whole: make "
                "room and start the same command again."
            ) from error
        finally:
            self.checkpoints_dir = folder
        if saved is None:  # only the main process has it
            ddp_barrier()
            return None
        target = folder / saved.path.name
        os.replace(saved.path, target)
        logger.info("Saved a checkpoint in %s", target)
        ddp_barrier()  # nobody looks for it before it is there
        files = {k: target / f.name for k, f in saved.paramfiles.items()}
        return saved._replace(path=target, paramfiles=files)


def plain_settings(text):
    """What a yaml says, as plain data: its tags too, but no comments.

    Arguments
    ---------
    text : str
        A HyperPyYAML text with its references resolved.

    Returns
    -------
    dict
        All but output_folder, train_logger and max_bad_share: a run that
        was moved, is watched otherwise or bears more bad files is the same.

    Example
    -------
    >>> plain_settings("gate: !new:lgl_plugin.gates.FixedGate {tau: 1}")
    {'gate': {'!new:lgl_plugin.gates.FixedGate': {'tau': 1}}}
    """

    class Loader(yaml.SafeLoader):
        """Reads a tagged node as {tag: value}."""

    def construct(loader, tag, node):
        if isinstance(node, yaml.MappingNode):
            return {"!" + tag: loader.construct_mapping(node, deep=True)}
        if isinstance(node, yaml.SequenceNode):
            return {"!" + tag: loader.construct_sequence(node, deep=True)}
        return {"!" + tag: loader.construct_scalar(node)}

    Loader.add_multi_constructor("!", construct)
    settings = yaml.load(text, Loader) or {}  # noqa: S506, it is a SafeLoader
    for key in ("output_folder", "train_logger", "max_bad_share"):
        settings.pop(key, None)
    return settings


@main_process_only
def save_weights(module, path):
    """Writes a module's plain state dict, atomically."""
    whole = io.BytesIO()  # torch hides from the file that a disk is full
    torch.save(module.state_dict(), whole)
    with atomic_write(path, "wb") as out:
        out.write(whole.getbuffer())


def load_weights(module, path):
    """Loads a plain state dict, strictly.

    Returns
    -------
    torch.nn.Module
        The same module.

    Raises
    ------
    ValueError
        If the file does not fit the module; names the first difference.

    Example
    -------
    >>> path = getfixture("tmp_path") / "embedding_model.ckpt"
    >>> save_weights(torch.nn.Linear(2, 3), path)
    >>> load_weights(torch.nn.Linear(2, 3), path)
    Linear(in_features=2, out_features=3, bias=True)
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        module.load_state_dict(weights)
    except Exception as error:
        first = str(error).strip().splitlines()[:2]
        raise ValueError(
            f"{path} does not fit the {type(module).__name__} of the yaml "
            f"(another width, or not an encoder): {' '.join(first)}"
        ) from error
    return module


@main_process_only
def save_arrays(path, **arrays):
    """Writes arrays as an npz file, atomically."""
    with atomic_write(path, "wb") as out:
        np.savez(out, **arrays)


def write_labels(path, utterances, labels):
    """Writes pseudo-labels as a csv of ID and label, atomically."""
    with atomic_write(path) as out:
        writer = csv.writer(out)
        writer.writerow(["ID", "label"])
        writer.writerows(zip(utterances, labels.tolist()))


def read_labels(path):
    """Reads what `write_labels` wrote.

    Returns
    -------
    (lgl_plugin.manifest.Strings, numpy.ndarray)
        Utterance IDs and their labels, int64 (N,).

    Raises
    ------
    ValueError
        If the file is damaged; names the line.

    Example
    -------
    >>> path = getfixture("tmp_path") / "labels.csv"
    >>> write_labels(path, ["a.wav", "b.wav"], torch.tensor([4, 0]))
    >>> names, labels = read_labels(path)
    >>> list(names), labels
    (['a.wav', 'b.wav'], array([4, 0]))
    """
    labels = array("q")

    def names(rows):
        try:
            if next(rows, None) != ["ID", "label"]:
                raise ValueError("the first line must be ID,label")
            for name, label in filter(None, rows):
                labels.append(int(label))
                if labels[-1] < 0 or CONTROL.search(name):
                    raise ValueError(f"{name!r} has the label {label}")
                yield name
        except (ValueError, OverflowError, csv.Error) as error:
            raise ValueError(
                f"{path}, line {rows.line_num}: {error}"
            ) from error

    with open(path, newline="", encoding="utf-8") as source:
        names = Strings(names(csv.reader(source)))
    return names, np.frombuffer(labels, np.int64)
