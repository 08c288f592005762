"""A record of each start of a run: code, command, machine."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import socket
import subprocess

import torch
from speechbrain.utils.distributed import main_process_only

from lgl_plugin.runs.arguments import key_of
from lgl_plugin.utils.distributed import launch_command, world_size
from lgl_plugin.utils.files import append_line

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


@main_process_only
def record_start(folder: str | pathlib.Path, stage: int, device: str) -> None:
    """Appends a start of a stage, 1 or 2, to a run's `starts.jsonl`."""
    # Settings and seed are in state.json, and as a yaml in the stage's folder.
    start = {
        "stage": stage,
        "time": datetime.datetime.now().astimezone().isoformat("T", "seconds"),
        "command": launch_command(),
        "directory": os.getcwd(),
        "folder": os.path.abspath(folder),
        "processes": world_size(),
        "commit": commit(),
        "versions": versions(),
        "host": socket.gethostname(),
        "system": platform.platform(),
        "device": device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    append_line(pathlib.Path(folder) / STARTS, json.dumps(start))


def read_starts(folder: str | pathlib.Path) -> list[dict]:
    """Reads the starts of a run, oldest first, without incomplete lines."""
    path = pathlib.Path(folder) / STARTS
    if not path.exists():
        return []
    starts = []
    for line in path.read_text("utf-8", "replace").splitlines():
        with contextlib.suppress(ValueError):  # a kill cut the line off
            starts.append(json.loads(line))
    return [start for start in starts if isinstance(start, dict)]


def command_of(start: dict, folder: str | pathlib.Path) -> str | None:
    """Returns the command of a start, for a folder that may have moved since.

    The command as typed would begin a new run in the old place.
    """
    command, here = start.get("command"), os.path.abspath(folder)
    if command is None or start.get("folder", here) == here:
        return command
    return into_folder(command, here)


def into_folder(command: str, folder: str) -> str:
    """Returns a command with another output_folder."""
    words = iter(shlex.split(command))
    kept = []
    for word in words:
        if word == "--output_folder":
            next(words, None)
        elif key_of(word) != "output_folder":
            kept.append(word)
    return shlex.join([*kept, f"--output_folder={folder}"])


def from_directory(start: dict, command: str) -> str:
    """Prefixes a command with `cd` to the directory where a start was made."""
    directory = start.get("directory", os.getcwd())
    if directory == os.getcwd():
        return command
    return f"cd {shlex.quote(directory)} && {command}"


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that matter."""
    installed = {"Python": platform.python_version()}
    for package in PACKAGES:
        # Only one of the two faiss packages is installed.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return installed


def commit() -> str | None:
    """Returns the git commit of the plugin, with "+" if files are changed.

    None if the plugin is installed without its repository; then only its
    version is known.
    """
    folder = pathlib.Path(__file__).resolve().parent
    try:
        # The environment may lie in another repository, whose commit says
        # nothing about the plugin.
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
        return _git(folder, "rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: pathlib.Path, *words: str) -> str:
    """Returns the output of a git command in a folder."""
    return subprocess.run(
        ["git", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    ).stdout.strip()


def device_name(device: str) -> str:
    """Returns the maker's name of a GPU or of the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):  # only Linux has the file
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
        for line in text.splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
