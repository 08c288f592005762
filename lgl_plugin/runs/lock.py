"""One process at a time in a run's folder."""

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

_held = {}  # from process and folder; a FileLock that is deleted lets go


def lock_folder(folder: str | pathlib.Path) -> None:
    """Keeps other processes out of a folder until this process ends.

    Raises RuntimeError, naming the holder, if another process is in it. The
    kernel lets go of the lock with the process, however that ends. On NFS it
    needs a server that locks; where the file system cannot lock, a warning
    says so. A process on another machine gets `SECONDS` to let go.
    """
    folder = pathlib.Path(folder)
    path = folder / LOCK
    # filelock drops the lock in a forked process, such as a loader worker: one
    # that outlives its parent must not keep the folder locked.
    key = os.getpid(), folder.resolve()
    if key in _held:
        return
    # Not by a soft lock, a mere file that would outlive a killed process.
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
