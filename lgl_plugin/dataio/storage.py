"""Tells failures of the storage from faults of a file, and retries them."""

import contextlib
import errno
import functools
import os
import time
from collections.abc import Callable, Iterator

# Errors of the storage or the machine, for which no file is to blame. An
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
WAITS = (1, 5, 25)  # seconds between attempts to read


class StorageFailure(OSError):
    """A file cannot be read now, because the storage or the machine fails."""


def patient(read: Callable) -> Callable:
    """Makes a function that reads a file retry while the storage fails."""

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
    """Raises StorageFailure for the block's errors that the storage caused."""
    try:
        yield
    except OSError as error:
        check_storage(path, error)
        raise


def check_storage(path: str | os.PathLike, error: OSError) -> None:
    """Raises StorageFailure if the storage caused an error, not the file."""
    if error.errno in STORAGE:
        raise StorageFailure(
            f"{path} cannot be read now: {error.strerror}. That is a fault of "
            "the storage or of this machine, and does not count as a bad "
            "file. Start the same command again when it is mended."
        ) from error
