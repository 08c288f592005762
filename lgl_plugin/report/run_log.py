"""Reads a stage's log.txt: its warnings, and the error that ended it."""

import pathlib
import re
from collections.abc import Iterator

from lgl_plugin.utils.errors import FULL_ERROR

# Headings of tracebacks, of this package and SpeechBrain; and the pattern of a
# traceback's last line, with the error's name.
FAILURES = (FULL_ERROR, "Exception:")
ERROR = re.compile(r"^[\w.]*(Error|Audio)(: |$)")
# The first line of an entry.
ENTRY = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ - \S+ - (\w+) - (.*)")
SHOWN = ("WARNING", "ERROR", "CRITICAL")


def entries(path: pathlib.Path) -> Iterator[tuple[str, str, str, list[str]]]:
    """Yields time, level, message and further lines of a log's entries.

    A log that is missing has none.
    """
    if not path.exists():
        return
    entry = None
    with open(path, encoding="utf-8", errors="replace") as log:
        for line in map(str.rstrip, log):
            if match := ENTRY.match(line):
                if entry:
                    yield entry
                entry = (*match.groups(), [])
            elif entry:
                entry[-1].append(line)
    if entry:
        yield entry


def warnings_and_errors(path: pathlib.Path) -> list[tuple[str, str, str]]:
    """Lists time, level and message of logged warnings and errors.

    The message of an exception ends in the last line of its traceback.
    """
    shown = []
    for time, level, message, lines in entries(path):
        if level in SHOWN:
            last = [line.strip() for line in lines if line][-1:]
            shown.append((time, level, " … ".join([message, *last])))
    return shown


def failure(path: pathlib.Path) -> str | None:
    """Returns the error that ended the latest start, if any."""
    message, lines = "", []
    for _, level, words, below in entries(path):
        # DEBUG messages of a process's end may follow its error.
        if level != "DEBUG" or words in FAILURES:
            message, lines = words, below
    begins = [n for n, line in enumerate(lines) if ERROR.match(line)]
    if message not in FAILURES or not begins:
        return None
    error = lines[begins[-1] :]
    return ERROR.sub("", "\n".join(error)) or error[0]
