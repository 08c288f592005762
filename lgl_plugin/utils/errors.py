"""Errors that a user can mend, shown as their message."""

import contextlib
import logging
import sys
import traceback
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


# Heading of an error's traceback in log.txt.
FULL_ERROR = "The error in full:"


class TrainingFailed(RuntimeError):
    """A training's error as a message; log.txt, if begun, has it in full."""


def message_of(error: BaseException) -> str:
    """Returns an error's message, without the traceback of a loader's."""
    message = str(error)
    if message.startswith("Caught "):
        message = message.strip().splitlines()[-1].partition(": ")[2]
    return message or type(error).__name__


def logged_message(error: BaseException) -> str:
    """Returns an error's message; log.txt, once begun, gets the traceback.

    Of an error that may be our fault, the message names that file. Ranks but
    the first have none: the message of an error of theirs is the traceback.
    """
    message = message_of(error)
    from lgl_plugin.utils.distributed import rank

    if isinstance(error, TrainingFailed):
        return message  # logged where it was raised
    logger.debug(FULL_ERROR, exc_info=error)
    logs = [
        handler.baseFilename
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.FileHandler)
    ]
    if isinstance(error, ValueError | OSError):
        return message
    if logs:
        message += f"\n{logs[-1]} has the traceback."
    elif rank() > 0 and not getattr(error, "on_all_ranks", False):
        message = "".join(traceback.format_exception(error)).rstrip()
    return message


@contextlib.contextmanager
def logged_errors(debug: bool = False) -> Iterator[None]:
    """Raises an error that a user can mend as TrainingFailed, and logs it.

    With `debug` it is raised as it is.
    """
    try:
        yield
    except EXPLAINED as error:
        if debug:
            raise
        raise TrainingFailed(logged_message(error)) from error


@contextlib.contextmanager
def explained_errors(status: int, debug: bool = False) -> Iterator[None]:
    """Ends the process with an error's message instead of a traceback.

    With `debug` the error is raised. `status` is the process's: 2 for a wrong
    call, 1 for a run that failed, as it always is for TrainingFailed.
    """
    try:
        yield
    except EXPLAINED as error:
        if debug:
            raise
        failed = isinstance(error, TrainingFailed)
        name = type(error.__cause__ if failed else error).__name__
        print(f"{name}: {logged_message(error)}", file=sys.stderr)
        raise SystemExit(1 if failed else status) from None
