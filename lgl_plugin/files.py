"""Files that are whole or absent: write aside, sync, rename."""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import tempfile


@contextlib.contextmanager
def atomic_write(path, mode="w"):
    """Opens a sibling of `path` that takes its place once fully written.

    If the block raises (a full disk, say), the sibling is removed and the
    previous file stays as it was.

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
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, sibling = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}.", suffix=".part"
    )
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with os.fdopen(handle, mode, **text) as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        # mkstemp makes files private; results are as readable as any other.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(sibling, 0o666 & ~umask)
        os.replace(sibling, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(sibling)
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise OSError(
                errno.ENOSPC,
                "No space left on the disk; what was there before is whole. "
                "Make room and start the same command again",
                str(path),
            ) from error
        raise


def leads_out(path, folder):
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
    >>> leads_out("/corpus/ann/1.wav", "/corpus")
    False
    >>> leads_out("/corpus/../etc/shadow", "/corpus")
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
