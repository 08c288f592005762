"""One process at a time in a run's folder."""

import datetime
import errno
import os
import pathlib
import socket

from speechbrain.utils.logger import get_logger

from lgl_plugin.utils.files import explain_os_error

logger = get_logger(__name__)

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

LOCK = ".lock"

_held = {}  # from folder to file descriptor


def lock_folder(folder):
    """Keeps other processes out of a folder until this one ends.

    The kernel lets go of the lock with the process, however that ends: a lock
    that nobody holds cannot be left behind. On NFS it needs a server that
    locks; where the file system cannot lock, a warning says so.

    Arguments
    ---------
    folder : str or pathlib.Path
        Made if it is missing. A process may hold it more than once.

    Raises
    ------
    RuntimeError
        If another process holds it; says which.
    OSError
        If the folder cannot be written.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> lock_folder(folder)
    >>> (folder / LOCK).read_text().split()[:2] == ["process", str(os.getpid())]
    True
    """
    folder = pathlib.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        key = folder.resolve()
        if key in _held:
            return
        # What it says of an earlier holder stays until the lock is there.
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise explain_os_error(error, folder) from error
    try:
        _lock(handle, folder)
        now = datetime.datetime.now().astimezone()
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        os.ftruncate(handle, 0)
        os.write(handle, f"{holder} since {now:%Y-%m-%d %T %z}\n".encode())
    except BaseException as error:
        os.close(handle)
        if isinstance(error, OSError):
            raise explain_os_error(error, folder / LOCK) from error
        raise
    _held[key] = handle


def _lock(handle, folder):
    """Takes the lock on an open file, or raises RuntimeError."""
    if fcntl is None:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            logger.warning(
                "%s: its file system cannot lock (%s). See to it yourself "
                "that no two processes write there.",
                folder,
                error.strerror,
            )
            return
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        holder = os.pread(handle, 200, 0).decode("utf-8", "replace").strip()
        raise RuntimeError(
            f"{folder} is being written by {holder or 'another process'}. "
            "Wait for its end or stop it; or set another --output_folder."
        ) from error


def _let_go():
    """Leaves the locks to the parent: a loader's process may outlive it."""
    for handle in _held.values():
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
