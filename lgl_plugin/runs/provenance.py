"""What a run was made by: code, command, machine, for each of its starts."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import socket
import subprocess

import torch
from speechbrain.utils.distributed import main_process_only

from lgl_plugin.utils.distributed import launch_command, world_size

STARTS = "starts.jsonl"
PACKAGES = (
    "lgl_plugin",
    "speechbrain",
    "torch",
    "torchaudio",
    "hyperpyyaml",
    "faiss-cpu",
    "faiss-gpu",
    "numpy",
    "scipy",
    "soundfile",
)


def start_of(stage, device):
    """Describes this start of a stage.

    Arguments
    ---------
    stage : int
        1 or 2.
    device : str
        What it trains on.

    Returns
    -------
    dict
        Plain values: stage, time, command, commit, versions, host, device and
        threads. Settings and seed are in `state.json`, and as a yaml in the
        stage's folder.

    Example
    -------
    >>> torch.__version__.startswith(start_of(1, "cpu")["versions"]["torch"])
    True
    """
    return {
        "stage": stage,
        "time": datetime.datetime.now().astimezone().isoformat("T", "seconds"),
        "command": launch_command(),
        "processes": world_size(),
        "commit": commit(),
        "versions": versions(),
        "host": socket.gethostname(),
        "system": platform.platform(),
        "device": device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


@main_process_only
def record_start(folder, stage, device):
    """Appends `start_of` to a run's `starts.jsonl`.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> record_start(folder, 2, "cpu")
    >>> read_starts(folder)[0]["stage"]
    2
    """
    with open(pathlib.Path(folder) / STARTS, "a", encoding="utf-8") as out:
        out.write(json.dumps(start_of(stage, device)) + "\n")


def read_starts(folder):
    """The starts of a run, the first one first; a torn line is left out.

    Example
    -------
    >>> read_starts("nowhere")
    []
    """
    path = pathlib.Path(folder) / STARTS
    if not path.exists():
        return []
    starts = []
    for line in path.read_text("utf-8", "replace").splitlines():
        try:
            start = json.loads(line)
        except ValueError:
            continue
        if isinstance(start, dict):
            starts.append(start)
    return starts


def versions():
    """Versions of Python and of the packages that matter.

    Example
    -------
    >>> versions()["Python"] == platform.python_version()
    True
    """
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # one of the two faiss packages is enough
    return found


def commit():
    """The git commit of the plugin, "+" where files differ from it.

    Returns
    -------
    str or None
        None if it is installed without its repository; its version tells
        then.

    Example
    -------
    >>> commit() is None or len(commit()) >= 40
    True
    """
    here = pathlib.Path(__file__).resolve().parent
    try:
        known = _git(here, "ls-files", "--error-unmatch", "__init__.py")
        if not known:
            return None
        changed = _git(here, "status", "--porcelain", "--untracked-files=no")
        return _git(here, "rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder, *words):
    return subprocess.run(
        ["git", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    ).stdout.strip()


def device_name(device):
    """What the maker calls a device.

    Example
    -------
    >>> isinstance(device_name("cpu"), str)
    True
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as source:
            for line in source:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
