"""Errors that a user can mend, shown as their message."""

import contextlib
import logging
import sys
from collections.abc import Iterator

# No module of torch at the top: help of `lgl` is to come at once.
logger = logging.getLogger(__name__)

# Their messages say what is wrong and what to do; others are faults of the
# program.
EXPLAINED = (ValueError, OSError, RuntimeError, ImportError, MemoryError)
# Of these, errors that name an argument, or a file that it names.
WRONG_CALL = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
)


def message_of(error: BaseException) -> str:
    """Returns an error's message, without the traceback of a loader's."""
    message = str(error)
    if message.startswith("Caught "):
        message = message.strip().splitlines()[-1].partition(": ")[2]
    return message or type(error).__name__


@contextlib.contextmanager
def explained_errors(status: int, debug: bool = False) -> Iterator[None]:
    """Ends the process with an error's message instead of a traceback.

    log.txt, once begun, keeps the traceback; with `debug` the error is raised.
    `status` is the process's: 2 for a wrong call, 1 for a run that failed.
    """
    from lgl_plugin.utils.distributed import rank

    try:
        yield
    except EXPLAINED as error:
        # log.txt is the main process's: an error of another rank alone, such
        # as memory that ran out there, would leave nothing to find it by.
        if debug or rank() > 0:
            raise
        logger.debug("The error in full:", exc_info=True)
        print(f"{type(error).__name__}: {message_of(error)}", file=sys.stderr)
        handlers = logging.getLogger().handlers
        is_logged = any(isinstance(h, logging.FileHandler) for h in handlers)
        users = isinstance(error, ValueError | OSError)  # no bug
        if is_logged and not users:
            print("log.txt of the run has the traceback.", file=sys.stderr)
        raise SystemExit(status) from None
