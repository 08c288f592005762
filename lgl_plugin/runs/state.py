"""Reads and writes state.json, and checks a step's files by checksums."""

import hashlib
import json
import pathlib
import re
from collections.abc import Iterable
from typing import Any

from lgl_plugin.utils.files import checksum, write_json

STATE = "state.json"
ADAPTATION = "stage 0"  # the key of the settings of `lgl adapt`


def describe(
    folder: pathlib.Path, paths: Iterable[pathlib.Path]
) -> dict[str, dict]:
    """Returns `bytes` and `sha256` of files, by their path below the folder.

    Files outside the folder and files that no longer exist, such as a step's
    progress, are left out. So are model cards and other pages (`.md`), because
    people may edit them.
    """
    own = {p for p in paths if p.is_relative_to(folder) and p.exists()}
    return {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": checksum(path),
        }
        for path in sorted(own)
        if path.suffix != ".md"
    }


def damage(folder: pathlib.Path, files: dict[str, dict]) -> list[str]:
    """Returns a line for each file that is not as `describe` recorded it."""
    lines = []
    for name, before in files.items():
        path = folder / name
        if not path.is_file():
            lines.append(f"{name} is missing")
        elif (size := path.stat().st_size) != before["bytes"]:
            was = before["bytes"]
            lines.append(f"{name} has {size:,} bytes and had {was:,}")
        elif checksum(path) != before["sha256"]:
            lines.append(f"{name} has been altered")
    return lines


def digest(value: Any) -> str:
    """Returns one checksum of plain data, such as that of `describe`."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def write_state(folder: pathlib.Path, state: dict) -> None:
    """Writes a run's `state.json`, atomically and with a checksum."""
    write_json(folder / STATE, {"checksum": digest(state), **state})


def read_state(folder: str | pathlib.Path) -> dict:
    """Reads a run's `state.json`.

    Raises FileNotFoundError if it is missing, ValueError if it is damaged.
    """
    path = pathlib.Path(folder) / STATE
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} holds no {STATE}: is it the output_folder of a run?"
        )
    content = path.read_bytes()
    try:
        state = json.loads(content)
        _check_state(state)
    except Exception as error:  # a damaged file may hold any JSON, or none
        raise ValueError(
            f"{path} is damaged ({error!r}): which steps are done, and with "
            "which settings, cannot be told. Nothing else was touched. Bring "
            "it back from a copy, or set another --output_folder; Stage II "
            "takes the encoder of this Stage I by --pretrained_encoder="
            f"{path.parent / 'ssps'}, or {path.parent / 'stage1'} if there is "
            "none. If you changed it on purpose, take out its line "
            '"checksum".'
        ) from error
    return state


def is_adaptation(folder: str | pathlib.Path) -> bool:
    """Tells whether a folder is that of an `lgl adapt`, not of a training."""
    if not (pathlib.Path(folder) / STATE).exists():
        return False
    return ADAPTATION in read_state(folder)["settings"]


def refuse_adaptation(folder: str | pathlib.Path) -> None:
    """Raises ValueError if a folder is that of an `lgl adapt`.

    The message names the folder's page, encoder and training.
    """
    if not is_adaptation(folder):
        return
    folder = pathlib.Path(folder)
    contents = {
        "Its page": [folder / "report" / "index.html"],
        "Its adapted encoder": [folder / "export" / "adapted"],
        "Its training": sorted(folder.glob("training*")),
    }
    said = [
        f" {what}: {path}."
        for what, paths in contents.items()
        for path in paths
        if path.exists()
    ]
    if not contents["Its adapted encoder"][0].exists():
        said.append(f" {nothing_kept(folder)}.")
    raise ValueError(
        f"{folder} is a folder of `lgl adapt`, not of a training."
        + "".join(said)
    )


def nothing_kept(folder: str | pathlib.Path) -> str:
    """Says why the folder of an `lgl adapt` may have no encoder."""
    return (
        "It has no adapted encoder: none was kept, or the work is not done, "
        f"as `lgl status {folder}` says"
    )


def _check_state(state: dict) -> None:
    """Raises an error, of one of several types, if a state is damaged."""
    before = state.pop("checksum", None)
    if before not in (None, digest(state)):
        raise ValueError("its checksum is another")
    parts = [state["sources"], state["failed"]]
    for name in ("settings", "done", "inputs", "files"):
        parts += [state[name], *state[name].values()]
    described = [f for files in state["files"].values() for f in files.values()]
    if not all(isinstance(part, dict) for part in [*parts, *described]):
        raise TypeError("what should be objects are not")
    described += [state["metrics"]] if "metrics" in state else []
    if not all(
        type(file["bytes"]) is int and type(file["sha256"]) is str
        for file in described
    ):
        raise TypeError("what should be a size or a checksum is not")
    # Checked for safety: a run clears folders by the names of steps.
    if not all(re.fullmatch(r"[\w/-]+", step) for step in state["done"]):
        raise ValueError("a step has an unknown name")


def check_artefact(path: str | pathlib.Path) -> None:
    """Raises ValueError if a file was changed since its step wrote it.

    A file that no run has on record is not checked.
    """
    path = pathlib.Path(path).absolute()
    for folder in path.parents[1:3]:  # a step's folder is one or two deep
        if not (folder / STATE).exists():
            continue
        step = path.parent.relative_to(folder).as_posix()
        files = read_state(folder)["files"].get(step, {})
        before = {key: files[key] for key in files if key == path.name}
        for line in damage(path.parent, before):
            raise ValueError(
                f"{path.parent}: {line}. Start the command that made it "
                f"again, with --output_folder={folder}: it does the step "
                f"{step} again and nothing that is whole."
            )
        return
