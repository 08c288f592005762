"""Shows errors that a user can mend by their message, without a traceback."""

import contextlib
import itertools
import logging
import re
import sys
import traceback
from collections.abc import Iterator

# No import of torch at the top of this module: `lgl --help` must be instant.
logger = logging.getLogger(__name__)

# Types of error whose message says what is wrong and what to do. An error of
# another type is a fault of the program.
EXPLAINED = (ValueError, OSError, RuntimeError, ImportError, MemoryError)
# Types of error that blame an argument, or a file that an argument names.
WRONG_CALL = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
)

# Heading of each traceback in the message of a loader process's error.
TRACEBACK = re.compile(
    r"^(?:Original )?Traceback \(most recent call last\):$", re.MULTILINE
)
# Heading of an error's traceback in log.txt.
FULL_ERROR = "The error in full:"


class TrainingFailed(RuntimeError):
    """The message of a training's error; log.txt, if begun, has the whole."""


def message_of(error: BaseException) -> str:
    """Returns an error's message, without the traceback of a loader process."""
    message = str(error)
    # torch puts the traceback of a loader process into the message.
    caught, *tracebacks = TRACEBACK.split(message)
    if caught.startswith("Caught ") and tracebacks:
        # The last one is of the error itself, others are of its causes.
        lines = tracebacks[-1].strip("\n").splitlines()
        frames = itertools.takewhile(lambda line: line[:1] == " ", lines)
        lines = lines[len([*frames]) :]
        message = "\n".join(lines).partition(": ")[2]
    return message or type(error).__name__


def logged_message(error: BaseException) -> str:
    """Returns an error's message; log.txt, once begun, gets the traceback.

    If the error may be a fault of this package, the message names log.txt.
    Only rank 0 has a log.txt: on other ranks the message is the traceback.
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

    `status` is the exit status: 2 for a wrong call, 1 for a failed run; for
    TrainingFailed it is always 1. With `debug` the error is raised instead.
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
