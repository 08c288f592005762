"""Faults of a disk or a machine, told from those of a file, and waited out."""

import contextlib
import errno
import functools
import os
import time
from collections.abc import Callable, Iterator

# Errors of the storage or the machine, which say nothing of a file. An
# input/output error (EIO) may be one bad sector, and counts as the file's.
STORAGE = {
    getattr(errno, name)
    for name in (
        *("ESTALE", "ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN"),
        *("ENETUNREACH", "ECONNREFUSED", "ECONNRESET", "ECONNABORTED"),
        *("ENOTCONN", "ESHUTDOWN", "EMFILE", "ENFILE", "ENOMEM", "EAGAIN"),
    )
    if hasattr(errno, name)
}
WAITS = (1, 5, 25)  # seconds between tries to read from such a storage


class StorageFailure(OSError):
    """A file that cannot be read now, for a fault that is not its own."""


def patient(read: Callable) -> Callable:
    """Lets a function that reads a file try again while the storage fails."""

    @functools.wraps(read)
    def read_patiently(*args, **kwargs):
        for seconds in WAITS:
            with contextlib.suppress(StorageFailure):
                return read(*args, **kwargs)
            time.sleep(seconds)
        return read(*args, **kwargs)

    return read_patiently


@contextlib.contextmanager
def storage_failures(path: str | os.PathLike) -> Iterator[None]:
    """Raises those of the block's errors that are not the file's own anew."""
    try:
        yield
    except OSError as error:
        check_storage(path, error)
        raise


def check_storage(path: str | os.PathLike, error: OSError) -> None:
    """Raises StorageFailure for an error that is not the file's own."""
    if error.errno in STORAGE:
        raise StorageFailure(
            f"{path} cannot be read now: {error.strerror}. That is a fault of "
            "the storage or of this machine, and does not count as a bad "
            "file. Start the same command again when it is mended."
        ) from error
