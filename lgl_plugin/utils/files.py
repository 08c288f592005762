"""Atomic writes (temporary file, sync, rename), and checks of files."""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import tempfile
import uuid
import zipfile
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np
from speechbrain.utils.distributed import main_process_only

# Error numbers of a disk that is full.
FULL = {
    errno.ENOSPC: "No space left on the disk",
    errno.EDQUOT: "The quota of the disk is used up",
    errno.EFBIG: "No file may grow so large here",
}

_watchers = []  # a list for each `written_files` in force


@contextlib.contextmanager
def atomic_write(path: str | pathlib.Path, mode: str = "w") -> Iterator[IO]:
    """Opens a temporary file that replaces `path` once fully written.

    The mode is "w" for text (UTF-8, newlines untouched) or "wb". If the block
    raises an error, such as that of a full disk, the temporary file is removed
    and the previous file stays as it was. After the block, the file and its
    name outlast a power cut.
    """
    path = pathlib.Path(path)
    sibling = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    is_text = "b" not in mode
    encoding, newline = ("utf-8", "") if is_text else (None, None)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        out = open(sibling, mode, encoding=encoding, newline=newline)
    except OSError as error:
        raise explain_os_error(error, path) from error
    try:
        with explain_full_disk(path), out:
            yield out
            out.flush()
            # Before the rename: otherwise, after a power cut, the name could
            # belong to a file whose content was never written.
            os.fsync(out.fileno())
        os.replace(sibling, path)
    except BaseException:
        sibling.unlink(missing_ok=True)
        raise
    sync(path.parent)  # the rename is an entry of the folder
    for written in _watchers:
        written.append(path)


@contextlib.contextmanager
def written_files() -> Iterator[list[pathlib.Path]]:
    """Collects the paths of the files that `atomic_write` puts in place."""
    written = []
    _watchers.append(written)
    try:
        yield written
    finally:
        _watchers.pop()


def write_json(path: str | pathlib.Path, value: Any) -> None:
    """Writes plain Python data as indented JSON, atomically."""
    with atomic_write(path) as out:
        json.dump(value, out, indent=1, allow_nan=False)
        out.write("\n")


def check_file(name: str, path: str | os.PathLike, remedy: str = "") -> None:
    """Raises FileNotFoundError, with the reason, if `path` is no file."""
    if os.path.isfile(path):
        return
    reason = f"there is no file {path}"
    if os.path.isdir(path):
        reason = f"{path} is a folder"
    elif os.path.exists(path):
        reason = f"{path} is a pipe or a device: write its lines to a file"
    raise FileNotFoundError(f"{name}: {reason}{remedy}")


def read_json(path: str | pathlib.Path) -> dict:
    """Reads a JSON object; {} if the file is missing or damaged."""
    try:
        value = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    # RecursionError: a damaged file of thousands of brackets.
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


@main_process_only
def save_arrays(path: str | pathlib.Path, **arrays: Any) -> None:
    """Writes arrays as an npz file, atomically, in the main process."""
    with atomic_write(path, "wb") as out:
        np.savez(out, **arrays)


def append_line(path: str | pathlib.Path, line: str) -> None:
    """Appends a line to a file and waits until it outlasts a power cut.

    If a killed process left the last line unfinished, the new line still
    begins on a line of its own.
    """
    with explain_full_disk(path), open(path, "a+b") as out:
        if out.tell():
            out.seek(-1, os.SEEK_END)
            if out.read(1) != b"\n":
                out.write(b"\n")
        out.write(line.encode() + b"\n")
        out.flush()
        os.fsync(out.fileno())


def load_arrays(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Reads the arrays of an npz file, and refuses a compressed one.

    Raises FileNotFoundError, or ValueError if the file is damaged.
    """
    os.stat(path)  # FileNotFoundError
    try:
        check_inflation(path)
        # zipfile reads no more of a member than the zip's directory says. If
        # an array's header claims more, numpy leaves that memory untouched.
        with np.load(path) as arrays:
            return dict(arrays)
    except Exception as error:  # torn zip files raise a dozen types
        raise ValueError(f"{path} is damaged: {error}") from error


def check_inflation(path: str | pathlib.Path) -> None:
    """Raises ValueError if the members of a zip file are larger than the file.

    Loading them could fill the memory. numpy and torch do not compress the
    files that they save.
    """
    size = os.stat(path).st_size
    with zipfile.ZipFile(path) as members:
        whole = sum(member.file_size for member in members.infolist())
    if whole > size:
        raise ValueError(
            f"its arrays take {whole:,} bytes and at most {size:,} are expected"
        )


def sync(path: str | pathlib.Path) -> None:
    """Waits until a file, or the names in a folder, outlast a power cut."""
    if os.name == "nt" and os.path.isdir(path):
        return  # Windows opens no folder
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network drives cannot sync a folder.
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def explain_full_disk(path: str | pathlib.Path) -> Iterator[None]:
    """Re-raises a full disk's error with a message that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise explain_os_error(error, path) from error
        raise


def explain_os_error(error: OSError, path: str | pathlib.Path) -> OSError:
    """Returns an error of the same kind that says what to do about it."""
    reason, remedy = error.strerror, "Make it writable, or write elsewhere"
    if error.errno in FULL:
        reason = FULL[error.errno]
        remedy = "Make room and start the same command again"
    elif error.errno in (errno.EEXIST, errno.ENOTDIR):
        reason, remedy = "a file is in the folder's place", "Name another one"
    message = f"{reason}; what was there before is whole. {remedy}"
    return OSError(error.errno, message, str(path))


def check_writable(folder: str | pathlib.Path) -> None:
    """Raises OSError, saying what to do, if no file can be made in a folder.

    For work that takes long before it writes. The check leaves nothing behind.
    If the folder does not exist, its nearest existing parent is checked.
    """
    above = pathlib.Path(folder).absolute()
    try:
        while not above.exists():
            above = above.parent
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise explain_os_error(error, folder) from error


def is_outside(path: str, folder: str | pathlib.Path) -> bool:
    """Tells from the text of a path whether it leads out of a folder.

    Every path with a `..` counts as outside: after a link, `..` may lead
    anywhere. Links in the folder are trusted, because whoever made them has
    access to the folder.
    """
    inside = os.path.join(folder, "")
    # The fast case, of almost every row of a manifest: abspath is far slower.
    if path.startswith(inside):
        return ".." in path[len(inside) :].split("/")
    folder = os.path.join(os.path.abspath(folder), "")
    below = os.path.abspath(path).startswith(folder)
    return ".." in path.split("/") or not below


def checksum(path: str | pathlib.Path) -> str:
    """Returns the SHA-256 of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as source:
        while block := source.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def short_names(
    paths: Sequence[str | pathlib.Path], suffix: str = ""
) -> list[str]:
    """Names paths by as many of their last parts as tell them apart.

    ValueError if a path is given twice.
    """
    # Absolute, but links stay: export/best is a name that a user gave.
    absolute = [os.path.abspath(path).removesuffix(suffix) for path in paths]
    parts = [pathlib.Path(path).parts for path in absolute]
    for n_parts in range(1, max(map(len, parts)) + 1):
        names = ["-".join(p[-n_parts:]) for p in parts]
        if len(set(names)) == len(names):
            return [name.lstrip("/-") for name in names]
    raise ValueError(
        f"one of these is given twice: {', '.join(map(str, paths))}"
    )
