"""A lock that admits one process at a time to a run's folder."""

import contextlib
import datetime
import errno
import os
import pathlib
import socket

from filelock import FileLock, Timeout
from speechbrain.utils.logger import get_logger

from lgl_plugin.utils.files import explain_os_error

logger = get_logger(__name__)

LOCK = ".lock"
# A server for network disks keeps a dead machine's lock for a minute or two.
SECONDS = 180
CANNOT_LOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_held = {}  # by process and folder; a FileLock is released when deleted


def lock_folder(folder: str | pathlib.Path) -> None:
    """Locks a folder until this process ends.

    Raises RuntimeError, naming the holder, if another process holds the lock.
    If the holder is on another machine, waits up to `SECONDS` first. The kernel
    releases the lock when the process ends, even by a kill. NFS needs a server
    that supports locks; if the file system cannot lock, a warning says so.
    """
    folder = pathlib.Path(folder)
    path = folder / LOCK
    # By process: filelock drops the lock in a forked process, such as a loader
    # worker, so that a worker that outlives its parent does not keep it.
    key = os.getpid(), folder.resolve()
    if key in _held:
        return
    # Not a soft lock: it is a mere file, which would outlive a killed process.
    lock = FileLock(path, fallback_to_soft=False, on_acquired=_write_holder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            holder = _holder(path)
            if not holder or f" on {socket.gethostname()} " in holder:
                raise
            logger.info(
                "%s: waiting up to %d s for %s", folder, SECONDS, holder
            )
            lock.acquire(timeout=SECONDS)
    except Timeout:
        holder = _holder(path)
        raise RuntimeError(
            f"{folder} is being written by {holder or 'another process'}. "
            "Wait for its end or stop it; or set another --output_folder."
        ) from None
    except OSError as error:
        if error.errno not in CANNOT_LOCK:
            raise explain_os_error(error, folder) from error
        logger.warning(
            "%s: its file system cannot lock (%s). See to it yourself that no "
            "two processes write there.",
            folder,
            error.strerror,
        )
    _held[key] = lock


def _holder(path: pathlib.Path) -> str:
    """Returns who holds a locked file; "" if that is not known."""
    with contextlib.suppress(OSError):  # Windows does not let one read it
        return path.read_text("utf-8", "replace").strip()
    return ""


def _write_holder(handle: int) -> None:
    """Writes into the locked file who holds it."""
    now = datetime.datetime.now().astimezone()
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    os.ftruncate(handle, 0)
    os.write(handle, f"{holder} since {now:%Y-%m-%d %T %z}\n".encode())
