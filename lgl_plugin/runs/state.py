"""What steps leave on disk: put on record with checksums, and checked."""

import hashlib
import json
import pathlib
import re

from lgl_plugin.utils.files import checksum, write_json

STATE = "state.json"


def describe(folder, paths):
    """Sizes and checksums of files.

    Arguments
    ---------
    folder : pathlib.Path
        Where they lie; what lies elsewhere is left out, and so are model
        cards and other pages (`.md`), which people may edit.
    paths : iterable of pathlib.Path
        Files; what is gone again, such as how far a step had come, is left
        out.

    Returns
    -------
    dict
        From the path below the folder, with slashes, to `bytes` and `sha256`.

    Example
    -------
    >>> path = getfixture("tmp_path") / "labels.csv"
    >>> _ = path.write_text("ID,label")
    >>> describe(path.parent, [path])["labels.csv"]["bytes"]
    8
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


def damage(folder, files):
    """What is no longer as it was put on record.

    Arguments
    ---------
    folder : pathlib.Path
        Where the files lie.
    files : dict
        From `describe`.

    Returns
    -------
    list of str
        A line for each such file.

    Example
    -------
    >>> path = getfixture("tmp_path") / "labels.csv"
    >>> _ = path.write_text("ID,label")
    >>> files = describe(path.parent, [path])
    >>> damage(path.parent, files)
    []
    >>> _ = path.write_text("ID,la")
    >>> damage(path.parent, files)
    ['labels.csv has 5 bytes and had 8']
    >>> path.unlink()
    >>> damage(path.parent, files)
    ['labels.csv is missing']
    """
    found = []
    for name, before in files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif (size := path.stat().st_size) != before["bytes"]:
            was = before["bytes"]
            found.append(f"{name} has {size:,} bytes and had {was:,}")
        elif checksum(path) != before["sha256"]:
            found.append(f"{name} has been altered")
    return found


def digest(value):
    """One checksum over plain data, such as what `describe` returns.

    Arguments
    ---------
    value : dict or list
        What `json.dumps` takes.

    Returns
    -------
    str
        64 hexadecimal digits.

    Example
    -------
    >>> digest({"a": 1}) == digest({"a": 1}) != digest({"a": 2})
    True
    """
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def write_state(folder, state):
    """Writes a run's `state.json`, atomically and with a checksum.

    Arguments
    ---------
    folder : pathlib.Path
        The run folder.
    state : dict
        See `run_folder.Run`.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> write_state(folder, {"settings": {}, "done": {"stage1": {}}})
    >>> sorted(json.loads((folder / STATE).read_text()))
    ['checksum', 'done', 'settings']
    """
    write_json(folder / STATE, {"checksum": digest(state), **state})


def read_state(folder):
    """Reads a run's `state.json`.

    Arguments
    ---------
    folder : str or pathlib.Path
        The run folder.

    Returns
    -------
    dict
        What `run_folder.Run` remembers; the records that earlier versions did
        not keep are empty.

    Raises
    ------
    FileNotFoundError
        If there is none.
    ValueError
        If it is damaged: not as it was written.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> write_state(folder, {"settings": {}, "done": {"stage1": {}}})
    >>> read_state(folder)["done"]
    {'stage1': {}}
    """
    path = pathlib.Path(folder) / STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        _check_state(state)
    except FileNotFoundError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}): which steps are done, and with "
            "which settings, cannot be told. Nothing else was touched. Bring "
            "it back from a copy, or set another --output_folder; Stage II "
            "takes the encoder of this Stage I by "
            f"--pretrained_encoder={path.parent / 'stage1'}. If you changed it "
            'on purpose, take out its line "checksum".'
        ) from error
    except RecursionError as error:
        raise ValueError(f"{path} is damaged: too deep") from error
    return state


def _check_state(state):
    """Raises what json and dicts raise unless a state is whole."""
    before = state.pop("checksum", None)
    if before not in (None, digest(state)):
        raise ValueError("its checksum is another")
    for name in ("inputs", "sources", "failed", "files"):
        state.setdefault(name, {})
    nested = ("settings", "done", "inputs", "files")
    parts = [state["sources"], state["failed"]]
    for name in nested:
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
    if not all(re.fullmatch(r"[\w/-]+", step) for step in state["done"]):
        raise ValueError("a step has a name that none of ours has")


def check_artefact(path):
    """Refuses a file that is not as the step that made it left it.

    Arguments
    ---------
    path : str or pathlib.Path
        A file; one that no run has put on record is taken as it is.

    Raises
    ------
    ValueError
        If it was damaged since; or its run's state was.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> encoder = folder / "stage1" / "embedding_model.ckpt"
    >>> encoder.parent.mkdir()
    >>> _ = encoder.write_bytes(b"weights")
    >>> files = {"stage1": describe(encoder.parent, [encoder])}
    >>> write_state(folder, {"settings": {}, "done": {}, "files": files})
    >>> check_artefact(encoder)
    >>> _ = encoder.write_bytes(b"weight")
    >>> check_artefact(encoder)
    Traceback (most recent call last):
    ValueError: ...embedding_model.ckpt has 6 bytes and had 7...
    """
    path = pathlib.Path(path).absolute()
    for folder in path.parents[1:3]:
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
