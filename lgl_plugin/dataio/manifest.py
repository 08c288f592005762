"""The manifest in memory: columns of numbers and text, one block each.

With a Python object per utterance, a million utterances would take a gigabyte,
and once more in every loader process: reading an object writes its reference
count, and so copies its memory. Forked processes share arrays.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import math
import os
import pathlib
import random
import re
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import IO

import numpy as np
from numpy.typing import ArrayLike

from lgl_plugin.utils.files import atomic_write, check_file, is_outside

COLUMNS = ("ID", "duration", "wav", "start", "stop", "spk_id")
SHARD_COLUMNS = ("first_byte", "n_bytes")
CHANNEL = "channel"  # of the file, from 0; empty for the mean of all
# Characters at which str.splitlines splits, the tab that separates the fields
# of bad_files.txt, and the control characters that a terminal would obey.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
# Plausible sampling rates, in Hz. A rate outside them means a damaged header,
# or a manifest that confuses samples with seconds.
RATES = (1_000, 10_000_000)


class Strings(Sequence[str]):
    """A list of strings in one block of bytes, separated by newlines.

    A string with a newline raises ValueError.
    """

    def __init__(self, strings: Iterable[str]):
        block = bytearray()
        for string in strings:
            if "\n" in string:
                raise ValueError(f"there is a newline in {string!r}")
            block += string.encode() + b"\n"
        self._index(np.frombuffer(bytes(block), np.uint8))

    @classmethod
    def load(cls, path: pathlib.Path) -> Strings:
        """Maps a file that `save` wrote into memory."""
        strings = cls.__new__(cls)
        # An empty file cannot be mapped: mmap raises ValueError.
        empty = path.stat().st_size == 0
        strings._index(
            np.empty(0, np.uint8) if empty else np.memmap(path, np.uint8, "r")
        )
        return strings

    def save(self, out: IO) -> None:
        """Writes one string a line to a file open for bytes."""
        out.write(self.block)

    def _index(self, block):
        """Sets the block and the positions of its newlines."""
        self.block = block
        self.ends = np.flatnonzero(block == ord("\n"))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> str:  # type: ignore[override]
        row = range(len(self.ends))[row]  # IndexError; negative rows
        start = self.ends[row - 1] + 1 if row else 0
        return self.block[start : self.ends[row]].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        # In blocks of 65,536 strings: a list of all would hold a million Python
        # objects at once, which this class avoids.
        for first in range(0, len(self), 65536):
            last = min(first + 65536, len(self)) - 1
            start = self.ends[first - 1] + 1 if first else 0
            block = self.block[start : self.ends[last]]
            yield from block.tobytes().decode().split("\n")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(map(str.__eq__, self, other))


@dataclasses.dataclass(frozen=True)
class Manifest:
    """N utterances in read-only columns.

    Example
    -------
    >>> manifest = Manifest.of([("a", "a.wav", 0.0, 2.5, "")])
    >>> manifest.ids[0], manifest.speakers[0].item()
    ('a', -1)
    >>> print(manifest[0])  # the arguments of `lgl_plugin.dataio.audio`
    {'wav': 'a.wav', 'offset': 0.0, 'duration': 2.5, 'place': None, \
'channel': None}
    """

    ids: Strings
    wavs: Strings  # paths of the audio files
    offsets: np.ndarray  # start in the file, seconds, float64 (N,)
    durations: np.ndarray  # seconds, float64 (N,)
    # True speakers as numbers, int64 (N,), -1 where unknown; for analysis
    # after the fact only.
    speakers: np.ndarray
    channels: np.ndarray  # to read, int16 (N,), -1 for the mean of all
    # First byte and number of bytes of each file within its shard, int64
    # (N, 2); None if the files are no shards.
    places: np.ndarray | None = None

    @classmethod
    def of(cls, rows: Iterable[tuple]) -> Manifest:
        """Makes a manifest of rows.

        A row is (ID, wav, offset, duration, speaker[, channel, place]). Channel
        and place may be None; either all rows have a place or none.
        """
        wavs, offsets, durations = [], array("d"), array("d")
        speakers, channels, places = array("q"), array("h"), array("q")
        codes = {"": -1}

        def ids():
            for name, wav, offset, duration, speaker, *rest in rows:
                channel, place = rest or (None, None)
                wavs.append(wav)
                offsets.append(offset)
                durations.append(duration)
                speakers.append(codes.setdefault(speaker, len(codes) - 1))
                channels.append(-1 if channel is None else channel)
                places.extend(place or ())
                yield name

        def column(values, dtype):
            # numpy makes an array over bytes read-only.
            return np.frombuffer(values.tobytes(), dtype)

        return cls(
            Strings(ids()),
            Strings(wavs),
            column(offsets, np.float64),
            column(durations, np.float64),
            column(speakers, np.int64),
            column(channels, np.int16),
            column(places, np.int64).reshape(-1, 2) if places else None,
        )

    def __len__(self) -> int:
        return len(self.durations)

    def __getitem__(self, row: int) -> dict:
        """Returns the arguments with which `read_crops` reads an utterance."""
        channel = self.channels[row].item()
        return {
            "wav": self.wavs[row],
            "offset": self.offsets[row].item(),
            "duration": self.durations[row].item(),
            "place": None if self.places is None else self.places[row].tolist(),
            "channel": None if channel < 0 else channel,
        }

    def take(self, rows: ArrayLike) -> Manifest:
        """Returns some rows (n,), int64; a row may occur twice."""
        rows = np.asarray(rows, np.int64)
        return Manifest(
            Strings(self.ids[row] for row in rows),
            Strings(self.wavs[row] for row in rows),
            self.offsets[rows],
            self.durations[rows],
            self.speakers[rows],
            self.channels[rows],
            None if self.places is None else self.places[rows],
        )

    def without_speakers(self) -> Manifest:
        """Returns the same utterances with all speakers unknown."""
        unknown = np.full(len(self), -1)
        unknown.flags.writeable = False
        return dataclasses.replace(self, speakers=unknown)

    def rows(self, ids: Collection[str]) -> np.ndarray:
        """Returns the rows of utterances, see `find`."""
        return find(self.ids, ids)


def find(within: Strings, wanted: Collection[str]) -> np.ndarray:
    """Returns the rows of strings in a list, int64, in the order of `wanted`.

    `within` holds each string once; one that it lacks raises KeyError.
    """
    row = {string: row for row, string in enumerate(within)}
    return np.fromiter((row[name] for name in wanted), np.int64, len(wanted))


def one_line(text: str) -> str:
    """Makes text one line: escapes control characters and invalid UTF-8."""
    text = CONTROL.sub(lambda c: c[0].encode("unicode_escape").decode(), text)
    return text.encode("utf-8", "backslashreplace").decode()


def load_manifest(
    path: str | pathlib.Path,
    data_root: str | pathlib.Path,
    allow_outside: bool = False,
) -> Manifest:
    """Reads a manifest that `prepare_manifest` or a user has written.

    Arguments
    ---------
    path : str or pathlib.Path
        A csv with at least the columns ID, duration, wav, start, stop, spk_id
        (the last may be empty); first_byte and n_bytes if the audio lies in
        shards; and channel, from 0, to read one of several.
    data_root : str or pathlib.Path
        Replaces `$data_root` in the paths.
    allow_outside : bool
        Whether audio may lie outside data_root.

    Returns
    -------
    Manifest
        The same object at the next call, as long as the file is the same.

    Raises
    ------
    FileNotFoundError
        When there is no such file.
    ValueError
        When the file is not UTF-8, lacks a column or has no utterance, or when
        a row repeats an ID, makes no sense or leads out of data_root. The
        message names the line.

    Example
    -------
    >>> path = getfixture("tmp_path") / "manifest.csv"
    >>> _ = path.write_text(
    ...     "ID,duration,wav,start,stop,spk_id\\n"
    ...     "a.wav,2.5,$data_root/a.wav,0,40000,\\n"
    ... )
    >>> load_manifest(path, "corpus").wavs[0]
    'corpus/a.wav'
    """
    check_file("manifest", path)
    return _parse(str(path), version(path), str(data_root), allow_outside)


def manifest_path(folder: pathlib.Path, settings: dict) -> str | pathlib.Path:
    """Returns the path of a run's manifest, by the settings of a stage.

    Raises FileNotFoundError if there is no such file.
    """
    path = settings["manifest"] or folder / "manifest.csv"
    check_file(
        "manifest",
        path,
        ". If it has moved, start the run's command again with its new place: "
        "that puts it on record",
    )
    return path


def run_manifest(
    folder: pathlib.Path, settings: dict, data_folder: str | None = None
) -> Manifest:
    """Reads the manifest of a run, by the settings of a stage."""
    return load_manifest(
        manifest_path(folder, settings),
        data_folder or settings["data_folder"],
        settings.get("allow_outside_data_folder", False),
    )


def version(path: str | pathlib.Path) -> tuple[int, int, int]:
    """Returns a file's inode, size and time of change, as a cache key."""
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


# Every step of a run, its export and its report load the same manifest, and
# parsing a million rows takes seconds. One object can be shared, because its
# columns are read-only. Two entries bound the memory: a caller alternates
# between two manifests at most.
@functools.lru_cache(maxsize=2)
def _parse(path, _version, data_root, allow_outside):
    """Parses a manifest; the version serves only as a key of the cache."""
    manifest = Manifest.of(_read_rows(path, data_root, allow_outside))
    if not len(manifest):
        raise ValueError(f"manifest {path} names no utterance")
    return manifest


def _read_rows(path, data_root, allow_outside):
    """Yields rows for `Manifest.of`; an error names the line."""
    seen = set()
    # utf-8-sig: spreadsheets begin a csv with a byte-order mark, which would
    # be taken for a part of the first column's name.
    with open(path, newline="", encoding="utf-8-sig") as source:
        reader = csv.reader(source, skipinitialspace=True)
        try:
            header = next(reader, [])
            _check_header(header)
            for fields in filter(None, reader):
                if len(fields) != len(header):
                    raise ValueError(
                        f"{len(fields)} fields under {len(header)} columns; a "
                        "field with a comma needs quotes"
                    )
                row = dict(zip(header, fields))
                name, wav = row["ID"], row["wav"]
                for column in ("ID", "wav"):
                    if not row[column]:
                        raise ValueError(f"{column} is empty")
                    if CONTROL.search(row[column]):
                        raise ValueError(
                            f"{column} {row[column]!r} holds a line break or "
                            "another control character"
                        )
                if name in seen:
                    raise ValueError(f"ID {name!r} occurs a second time")
                seen.add(name)
                audio = wav.replace("$data_root", data_root, 1)
                span = _span(row["duration"], row["start"], row["stop"])
                channel, place = _channel(row.get(CHANNEL, "")), _place(row)
                if not allow_outside and is_outside(audio, data_root):
                    raise ValueError(
                        f"{wav!r} leads out of the data folder {data_root}. "
                        "Put the audio, or a link to it, there and begin the "
                        "path with $data_root/; or, if you trust this "
                        "manifest, set allow_outside_data_folder: True"
                    )
                yield name, audio, *span, row["spk_id"], channel, place
        except UnicodeDecodeError as error:
            raise ValueError(
                f"manifest {path} is not UTF-8 after line {reader.line_num}: "
                f"{error}"
            ) from error
        except (ValueError, csv.Error) as error:
            raise ValueError(
                f"manifest {path}, line {max(reader.line_num, 1)}: {error}"
            ) from error


def _check_header(header):
    """Raises ValueError if a column is missing."""
    missing = [column for column in COLUMNS if column not in header]
    if missing:
        raise ValueError(
            f"it lacks {', '.join(missing)}: the first line names the columns "
            f"{header}, and {','.join(COLUMNS)} are needed (spk_id may be "
            "empty)"
        )
    shard = [column for column in SHARD_COLUMNS if column in header]
    if len(shard) == 1:
        raise ValueError(f"{shard[0]} needs both of {SHARD_COLUMNS}")


def _numbers(kind, *texts):
    """Parses numbers; all are NaN, which is in no range, if one is invalid."""
    try:
        return [kind(text) for text in texts]
    except ValueError:
        return [math.nan] * len(texts)


def _span(duration, start, stop):
    """Returns an utterance's offset and duration in seconds."""
    (seconds,) = _numbers(float, duration)
    if not 0 < seconds < math.inf:
        raise ValueError(f"duration {duration!r} is not a number of seconds")
    first, last = _numbers(int, start, stop)
    if not 0 <= first < last < 2**62:
        raise ValueError(
            f"start {start!r} and stop {stop!r} must be whole numbers of "
            "samples, start the smaller"
        )
    rate = (last - first) / seconds
    # A hundredth of slack: durations are rounded.
    if not 0.99 * RATES[0] < rate < 1.01 * RATES[1]:
        raise ValueError(
            f"from start {start} to stop {stop} in {duration} s would be "
            f"{rate:.3g} samples a second; start and stop count samples at "
            "the file's own rate, duration counts seconds"
        )
    return first / rate, seconds


def _channel(text):
    """Returns the channel as a number, None for the mean of all."""
    (channel,) = _numbers(int, text or "-1")
    if text and not 0 <= channel < 2**15:
        raise ValueError(
            f"channel {text!r} must be a whole number from 0, or empty for the "
            "mean of all channels"
        )
    return channel if text else None


def _place(row):
    """Returns first byte and number of bytes in a shard; None without one."""
    if SHARD_COLUMNS[0] not in row:
        return None
    texts = [row[column] for column in SHARD_COLUMNS]
    first, size = _numbers(int, *texts)
    if not (0 <= first < 2**62 and 0 < size < 2**62):
        raise ValueError(
            f"first_byte {texts[0]!r} and n_bytes {texts[1]!r} must be whole "
            "numbers of bytes"
        )
    return first, size


def write_part(
    manifest: str | pathlib.Path,
    path: str | pathlib.Path,
    rows: Collection[int],
) -> None:
    """Writes some rows of a manifest to a new manifest."""
    wanted = set(rows)
    with open(manifest, newline="", encoding="utf-8-sig") as source:
        lines = filter(None, csv.reader(source, skipinitialspace=True))
        header = next(lines)
        kept = {row: line for row, line in enumerate(lines) if row in wanted}
    with atomic_write(path) as out:
        # All quoted: a reader drops blanks before a cell that is not quoted.
        form = csv.writer(out, lineterminator="\n", quoting=csv.QUOTE_ALL)
        form.writerow(header)
        form.writerows(kept[row] for row in rows)


def held_out(
    n_utterances: int, share: float, seed: int, labelled: ArrayLike = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the rows to train on and those set aside.

    Arguments
    ---------
    n_utterances : int
        Rows to draw from.
    share : float
        The share to set aside, between 0 and 1. At least 2 utterances are set
        aside, if there are 2, and at most 2,000, because all their pairs are
        pseudo-trials.
    seed : int
        The seed of the draw.
    labelled : array_like
        Rows, int64, that a user has labelled. They are trained on, and set
        aside only if there are fewer than two other rows.

    Returns
    -------
    numpy.ndarray, numpy.ndarray
        Rows in rising order, int64.

    Example
    -------
    >>> train, aside = held_out(10, 0.2, seed=1)
    >>> len(train), len(aside), set(train) & set(aside)
    (8, 2, set())
    """
    n_valid = min(max(2, round(share * n_utterances)), 2000)
    rows = np.arange(n_utterances)
    kept = np.asarray(labelled, np.int64)
    free = np.setdiff1d(rows, kept, assume_unique=True)
    if len(free) < 2:
        free = rows
    n_drawn = min(n_valid, len(free))
    aside = np.sort(free[random.Random(seed).sample(range(len(free)), n_drawn)])
    return np.setdiff1d(rows, aside), aside
