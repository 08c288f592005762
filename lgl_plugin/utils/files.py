"""Files that are whole or absent: write aside, sync, rename."""

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
    """Opens a sibling of `path` that takes its place once fully written.

    The mode is "w" for text (UTF-8, newlines untouched) or "wb". If the block
    raises (a full disk, say), the sibling is removed and the previous file
    stays as it was. Afterwards the file and its name outlast a power cut.
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
            # Before the rename: after a power cut the name would else stand
            # for a file whose blocks were never written.
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
    """Raises FileNotFoundError, which says what is there, for no file."""
    if os.path.isfile(path):
        return
    found = f"there is no file {path}"
    if os.path.isdir(path):
        found = f"{path} is a folder"
    elif os.path.exists(path):
        found = f"{path} is a pipe or a device: write its lines to a file"
    raise FileNotFoundError(f"{name}: {found}{remedy}")


def read_json(path: str | pathlib.Path) -> dict:
    """Reads a JSON object; {} if there is no file, or it is damaged."""
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

    A line that a kill tore does not swallow it.
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
    """Reads the arrays of an npz file, refusing one that inflates.

    Raises FileNotFoundError, or ValueError if the file is damaged.
    """
    os.stat(path)  # FileNotFoundError
    try:
        check_inflation(path)
        # zipfile reads no more of a member than its directory says; of an
        # array whose header claims more, numpy touches no further page.
        with np.load(path) as arrays:
            return dict(arrays)
    except Exception as error:  # torn zip files raise a dozen types
        raise ValueError(f"{path} is damaged: {error}") from error


def check_inflation(path: str | pathlib.Path) -> None:
    """Raises ValueError for a zip file with more in it than its own size.

    numpy and torch, which write zip files of arrays and of tensors, do not
    compress.
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
    """Raises the error of a disk that is full again, saying what to do."""
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

    For work that takes long before it writes. Leaves nothing: a folder that is
    not there counts by the nearest one above it that is.
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
    """Tells by its text whether a path leads out of a folder.

    Every path with a `..` in it counts as outside: behind a link it may lead
    anywhere. A link within the folder may lead anywhere too; whoever made it
    has access to the folder.
    """
    inside = os.path.join(folder, "")
    # Decides for almost every row of a manifest; abspath takes far longer.
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
