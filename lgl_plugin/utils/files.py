"""Files that are whole or absent: write aside, sync, rename."""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import tempfile

import numpy as np
from speechbrain.utils.distributed import main_process_only


@main_process_only
def save_arrays(path, **arrays):
    """Writes arrays as an npz file, atomically.

    Example
    -------
    >>> path = getfixture("tmp_path") / "gate.npz"
    >>> save_arrays(path, losses=np.array([0.5, 9.0]), tau=1.0)
    >>> with np.load(path) as arrays:
    ...     arrays["losses"] <= arrays["tau"]
    array([ True, False])
    """
    with atomic_write(path, "wb") as out:
        np.savez(out, **arrays)


# What a full disk may say.
FULL = {
    errno.ENOSPC: "No space left on the disk",
    errno.EDQUOT: "The quota of the disk is used up",
    errno.EFBIG: "No file may grow so large here",
}

_watchers = []


@contextlib.contextmanager
def atomic_write(path, mode="w"):
    """Opens a sibling of `path` that takes its place once fully written.

    If the block raises (a full disk, say), the sibling is removed and the
    previous file stays as it was. Afterwards the file and its name outlast a
    power cut.

    Arguments
    ---------
    path : str or pathlib.Path
        The file to write; its folder is made if it is missing.
    mode : str
        "w" for text (UTF-8, newlines untouched) or "wb" for bytes.

    Yields
    ------
    file object

    Raises
    ------
    OSError
        When the disk is full or the folder cannot be written.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> with atomic_write(folder / "labels.txt") as out:
    ...     _ = out.write("whole")
    >>> (folder / "labels.txt").read_text()
    'whole'
    >>> [entry.name for entry in folder.iterdir()]
    ['labels.txt']
    """
    path = pathlib.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, sibling = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=".part"
        )
    except OSError as error:
        raise explain_os_error(error, path) from error
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with explain_full_disk(path), os.fdopen(handle, mode, **text) as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        # mkstemp makes files private; results are as readable as any other.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(sibling, 0o666 & ~umask)
        os.replace(sibling, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(sibling)
        raise
    sync(path.parent)
    for written in _watchers:
        written.append(path)


@contextlib.contextmanager
def written_files():
    """Collects what `atomic_write` puts in its place meanwhile.

    Yields
    ------
    list of pathlib.Path

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> with written_files() as written:
    ...     write_json(folder / "state.json", {})
    >>> [path.name for path in written]
    ['state.json']
    """
    written = []
    _watchers.append(written)
    try:
        yield written
    finally:
        _watchers.pop()


def sync(path):
    """Waits until a file, or the names in a folder, would outlast a power cut.

    Arguments
    ---------
    path : str or pathlib.Path
        A file or a folder.

    Raises
    ------
    OSError
        When the disk cannot take it.

    Example
    -------
    >>> sync(getfixture("tmp_path"))
    """
    if os.name == "nt" and os.path.isdir(path):
        return  # Windows opens no folder
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network drives know of no such thing for folders.
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def explain_full_disk(path):
    """Lets the error of a full disk say what to do.

    Arguments
    ---------
    path : str or pathlib.Path
        What is written meanwhile.

    Raises
    ------
    OSError
        Of the same kind, see `explain_os_error`.

    Example
    -------
    >>> with explain_full_disk("metrics.jsonl"):
    ...     raise OSError(errno.ENOSPC, "No space left on device")
    Traceback (most recent call last):
    OSError: [Errno 28] No space left on the disk; what was there before is \
whole. Make room and start the same command again: 'metrics.jsonl'
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise explain_os_error(error, path) from error
        raise


def explain_os_error(error, path):
    """An error of the file system in words that say what to do.

    Arguments
    ---------
    error : OSError
        What was raised.
    path : str or pathlib.Path
        What was to be written.

    Returns
    -------
    OSError
        Of the same kind.

    Example
    -------
    >>> raise explain_os_error(OSError(errno.EROFS, "Read-only"), "state.json")
    Traceback (most recent call last):
    OSError: [Errno 30] Read-only; what was there before is whole. Make it \
writable, or write elsewhere: 'state.json'
    """
    reason, remedy = error.strerror, "Make it writable, or write elsewhere"
    if error.errno in FULL:
        reason = FULL[error.errno]
        remedy = "Make room and start the same command again"
    words = f"{reason}; what was there before is whole. {remedy}"
    return OSError(error.errno, words, str(path))


def is_outside(path, folder):
    """Whether the text of a path leads out of a folder.

    Only the text counts: a link within the folder may lead anywhere, since
    whoever made it has access to the folder.

    Arguments
    ---------
    path : str
        Of a file that a manifest or a trial list names.
    folder : str or pathlib.Path
        Where it should lie.

    Returns
    -------
    bool
        True for every path with a `..` in it: behind a link it may lead
        anywhere.

    Example
    -------
    >>> is_outside("/corpus/ann/1.wav", "/corpus")
    False
    >>> is_outside("/corpus/../etc/shadow", "/corpus")
    True
    """
    inside = os.path.join(folder, "")
    if path.startswith(inside):
        return ".." in path[len(inside) :].split("/")
    folder = os.path.join(os.path.abspath(folder), "")
    return ".." in path.split("/") or not os.path.abspath(path).startswith(
        folder
    )


def write_json(path, value):
    """Writes plain Python data as indented JSON, atomically.

    Arguments
    ---------
    path : str or pathlib.Path
        The file to write.
    value : dict or list
        What `json.dumps` takes.

    Example
    -------
    >>> path = getfixture("tmp_path") / "state.json"
    >>> write_json(path, {"done": ["stage1"]})
    >>> json.loads(path.read_text())
    {'done': ['stage1']}
    """
    with atomic_write(path) as out:
        json.dump(value, out, indent=1, allow_nan=False)
        out.write("\n")


def checksum(path):
    """The SHA-256 of a file, as 64 hexadecimal digits.

    Arguments
    ---------
    path : str or pathlib.Path
        An existing file.

    Returns
    -------
    str

    Example
    -------
    >>> path = getfixture("tmp_path") / "encoder.ckpt"
    >>> _ = path.write_bytes(b"weights")
    >>> checksum(path)[:8]
    '9a129038'
    """
    digest = hashlib.sha256()
    with open(path, "rb") as source:
        while block := source.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
