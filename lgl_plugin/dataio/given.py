"""Labels that a user gives for a few utterances: a csv of utterance, speaker.

These labels may enter training, because the user asked for that. The speakers
in a manifest and the trial lists are something else: true labels for figures
afterwards, which no training reads.
"""

import csv
import dataclasses
import os
import pathlib
import unicodedata
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike
from speechbrain.utils.logger import get_logger

from lgl_plugin.utils.files import check_file

logger = get_logger(__name__)

COLUMNS = ("utterance", "speaker")
SHOWN = 3  # names in a message


@dataclasses.dataclass(frozen=True)
class GivenLabels:
    """The speakers that a user names, and their utterances."""

    speakers: tuple[str, ...]  # in the order of the file
    # The speaker of each utterance of a manifest as a number from 0, int64
    # (N,), -1 where none is given.
    by_row: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        """The rows of the manifest that are labelled, int64."""
        return np.flatnonzero(self.by_row >= 0)

    def of(self, rows: ArrayLike) -> np.ndarray:
        """Returns the labels of the rows that can be read, int64 (n,).

        Raises ValueError if a speaker has none of these rows.
        """
        labels = self.by_row[np.asarray(rows, np.int64)]
        lost = sorted({*range(len(self.speakers))} - {*labels.tolist()})
        if lost:
            names = _some(self.speakers[number] for number in lost)
            raise ValueError(
                f"no utterance that is labelled {names} can be read: repair "
                "them, or take the speaker out of the labels"
            )
        return labels


def read_given(path: str | pathlib.Path, ids: Iterable[str]) -> GivenLabels:
    """Reads a csv with the columns `utterance` and `speaker`.

    `ids` are the N utterances of the manifest. For a folder of audio they are
    paths in the folder, which the csv may write in another Unicode form or
    with a leading `./`. Raises ValueError if a column, a row or a name is
    wrong. Warns of speakers with a single utterance, because nothing can show
    that its label is wrong.
    """
    named, ids = read_names(path), [*ids]
    if unknown := named.keys() - {*ids}:
        # A Mac writes a letter and its accent as two characters in file names;
        # a typed csv has one character, which looks the same.
        alike = {_plain(name): name for name in ids}
        for name in [name for name in unknown if _plain(name) in alike]:
            utterance = alike[_plain(name)]
            if utterance in named:
                raise ValueError(
                    f"{path} labels {utterance!r} a second time as {name!r}"
                )
            named[utterance] = named.pop(name)
    numbers: dict[str, int] = {}
    labels = [
        numbers.setdefault(named.pop(name), len(numbers))
        if name in named
        else -1
        for name in ids
    ]
    if named:
        raise ValueError(
            f"{path} labels {len(named)} utterances that are not there, such "
            f"as {_some(named)}. Name files by their path in the folder of "
            "audio; those that cannot be used are in bad_files.txt"
        )
    by_row = np.array(labels, np.int64)
    sizes = np.bincount(by_row[by_row >= 0])
    alone = [name for name, number in numbers.items() if sizes[number] == 1]
    if alone:
        logger.warning(
            "%s: %d speakers have a single utterance (%s), so nothing can "
            "show that its label is wrong",
            *(path, len(alone), _some(alone)),
        )
    return GivenLabels(tuple(numbers), by_row)


def read_names(path: str | pathlib.Path) -> dict[str, str]:
    """Returns the speaker of each utterance that a csv names, as a dict.

    FileNotFoundError or ValueError says what is wrong with the file.
    """
    check_file("labels", path)
    named: dict[str, str] = {}
    try:
        # utf-8-sig: spreadsheets begin a csv with a byte-order mark.
        with open(path, newline="", encoding="utf-8-sig") as source:
            # strict: otherwise a stray quote would swallow the lines after it.
            reader = csv.DictReader(source, skipinitialspace=True, strict=True)
            missing = {*COLUMNS} - {*(reader.fieldnames or ())}
            if missing:
                raise ValueError(
                    f"{path} lacks {' and '.join(sorted(missing))}: the first "
                    f"line must name the columns {','.join(COLUMNS)}, with a "
                    f"comma between, and names {reader.fieldnames or []}"
                )
            for row in reader:
                # Stripped: blanks would make two speakers of one.
                name, speaker = ((row[c] or "").strip() for c in COLUMNS)
                place = f"{path}, line {reader.line_num}"
                if None in row:
                    raise ValueError(
                        f"{place} has more fields than the first line: put a "
                        'name with a comma in quotes ("Smith, Ann")'
                    )
                if not name or not speaker:
                    raise ValueError(f"{place}: utterance or speaker is empty")
                if name in named:
                    raise ValueError(f"{place}: {name!r} occurs a second time")
                named[name] = speaker
    except csv.Error as error:
        # The line where reading stopped; the quote may have opened earlier.
        line = reader.reader.line_num
        raise ValueError(
            f"{path} is no csv up to line {line} ({error}): look for a quote "
            'that is not closed, and double one within a name ("")'
        ) from error
    except UnicodeDecodeError as error:  # such as a spreadsheet in Latin-1
        raise ValueError(
            f"{path} is not in UTF-8: save it as such a csv ({error})"
        ) from error
    if not named:
        raise ValueError(f"{path} labels no utterance")
    return named


def _plain(name):
    """Returns a path in Unicode's composed form, without `./`."""
    return os.path.normpath(unicodedata.normalize("NFC", name))


def _some(names):
    """Returns the first few names as a text."""
    names = [*names]
    shown = ", ".join(map(repr, names[:SHOWN]))
    return shown + (", …" if len(names) > SHOWN else "")
