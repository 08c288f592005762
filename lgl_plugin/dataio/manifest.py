"""The manifest in memory: columns of numbers and text, one block each.

A Python object per utterance would cost a gigabyte at a million of them, and
once more in every loader process, because reading an object writes to its
reference count. Arrays are shared with processes that fork.
"""

import collections.abc
import csv
import dataclasses
import math
import os
import random
import re
from array import array

import numpy as np

from lgl_plugin.utils.files import is_outside

COLUMNS = ("ID", "duration", "wav", "start", "stop", "spk_id")
SHARD_COLUMNS = ("first_byte", "n_bytes")
# Everything that str.splitlines splits at, the tab of bad_files.txt, and what
# a terminal would obey.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
# Sampling rates, in Hz; what lies beyond is a mistake of units.
RATES = (1e3, 1e7)


class Strings(collections.abc.Sequence):
    """A list of strings in one block of bytes.

    Arguments
    ---------
    strings : iterable of str
        None of them with a newline, which parts them in the block.

    Raises
    ------
    ValueError
        If a string holds a newline.

    Example
    -------
    >>> names = Strings(["a.wav", "b.wav", "c.wav"])
    >>> names[1], len(names), list(names)
    ('b.wav', 3, ['a.wav', 'b.wav', 'c.wav'])
    """

    def __init__(self, strings):
        block = bytearray()
        for string in strings:
            if "\n" in string:
                raise ValueError(f"there is a newline in {string!r}")
            block += string.encode() + b"\n"
        self._index(np.frombuffer(bytes(block), np.uint8))

    @classmethod
    def load(cls, path):
        """Opens a file of lines, such as `save` wrote; stays on disk."""
        strings = cls.__new__(cls)
        if path.stat().st_size:
            strings._index(np.memmap(path, np.uint8, "r"))
        else:  # which cannot be mapped
            strings._index(np.empty(0, np.uint8))
        return strings

    def save(self, out):
        """Writes one string a line to a file open for bytes."""
        out.write(self.block)

    def _index(self, block):
        self.block = block
        self.ends = np.flatnonzero(block == ord("\n"))

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, row):
        row = range(len(self.ends))[row]
        start = self.ends[row - 1] + 1 if row else 0
        return self.block[start : self.ends[row]].tobytes().decode()

    def __iter__(self):
        # 64 thousand at a time: all of them would be a list of objects.
        for first in range(0, len(self), 65536):
            last = min(first + 65536, len(self)) - 1
            start = self.ends[first - 1] + 1 if first else 0
            block = self.block[start : self.ends[last]]
            yield from block.tobytes().decode().split("\n")

    def __eq__(self, other):
        return len(self) == len(other) and all(map(str.__eq__, self, other))


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Utterances in columns.

    Arguments
    ---------
    ids : Strings
        Utterance IDs.
    wavs : Strings
        Audio files.
    offsets : numpy.ndarray
        Where the utterances begin in them, seconds, float64 (N,).
    durations : numpy.ndarray
        Seconds, float64 (N,).
    speakers : numpy.ndarray
        True speakers as numbers, int64 (N,), -1 where unknown. For the
        analysis; nothing that trains reads them.
    places : numpy.ndarray, optional
        First byte and number of bytes of each audio file within `wavs`, int64
        (N, 2), if those are shards.

    Example
    -------
    >>> manifest = Manifest.of([("a", "a.wav", 0.0, 2.5, "")])
    >>> manifest[0]
    {'wav': 'a.wav', 'offset': 0.0, 'duration': 2.5, 'place': None}
    >>> manifest.ids[0], manifest.speakers[0].item()
    ('a', -1)
    """

    ids: Strings
    wavs: Strings
    offsets: np.ndarray
    durations: np.ndarray
    speakers: np.ndarray
    places: np.ndarray = None

    @classmethod
    def of(cls, rows):
        """Makes one of rows (ID, wav, offset, duration, speaker[, place])."""
        wavs, offsets, durations = [], array("d"), array("d")
        speakers, places, codes = array("q"), array("q"), {"": -1}

        def ids():
            for name, wav, offset, duration, speaker, *place in rows:
                wavs.append(wav)
                offsets.append(offset)
                durations.append(duration)
                speakers.append(codes.setdefault(speaker, len(codes) - 1))
                for pair in place:
                    places.extend(pair)
                yield name

        return cls(
            Strings(ids()),
            Strings(wavs),
            np.frombuffer(offsets),
            np.frombuffer(durations),
            np.frombuffer(speakers, np.int64),
            np.frombuffer(places, np.int64).reshape(-1, 2) if places else None,
        )

    def __len__(self):
        return len(self.durations)

    def __getitem__(self, row):
        """What is needed to read an utterance, as a dict."""
        return {
            "wav": self.wavs[row],
            "offset": self.offsets[row].item(),
            "duration": self.durations[row].item(),
            "place": None if self.places is None else self.places[row].tolist(),
        }

    def rows(self, ids):
        """The rows of some utterances, in their order, int64.

        Raises
        ------
        KeyError
            If there is no such utterance.
        """
        return find(self.ids, ids)


def find(within, wanted):
    """Where strings stand in a list of strings.

    Arguments
    ---------
    within : Strings
        Where to look; each string once.
    wanted : collection of str
        What to look for.

    Returns
    -------
    numpy.ndarray
        Rows in `within`, int64, in the order of `wanted`.

    Raises
    ------
    KeyError
        If one of `wanted` is not there.

    Example
    -------
    >>> find(Strings("abc"), ["c", "a"])
    array([2, 0])
    """
    row = {string: row for row, string in enumerate(within)}
    return np.fromiter(
        (row[string] for string in wanted), np.int64, len(wanted)
    )


def one_line(text):
    """Text for a field of a line: what would break it, or is no UTF-8, escaped.

    Example
    -------
    >>> print(one_line("a\\tb"), one_line("\\udce9.wav"), one_line("ß.wav"))
    a\\tb \\udce9.wav ß.wav
    """
    text = CONTROL.sub(lambda c: c[0].encode("unicode_escape").decode(), text)
    return text.encode("utf-8", "backslashreplace").decode()


def load_manifest(path, data_root, allow_outside=False):
    """Reads a manifest, such as one that a user brings along.

    Arguments
    ---------
    path : str or pathlib.Path
        A csv with at least the columns ID, duration, wav, start, stop, spk_id
        (of which the last may be empty), and first_byte and n_bytes if the
        audio lies in shards.
    data_root : str
        What stands for `$data_root` in it.
    allow_outside : bool
        Whether it may name audio that is not below data_root.

    Returns
    -------
    Manifest

    Raises
    ------
    FileNotFoundError
        When there is no such file.
    ValueError
        When it is not UTF-8, lacks a column, names an utterance twice or
        none at all, a row makes no sense or leads out of data_root; names
        the line.

    Example
    -------
    >>> path = getfixture("tmp_path") / "manifest.csv"
    >>> _ = path.write_text(
    ...     "ID,duration,wav,start,stop,spk_id\\n"
    ...     "a.wav,2.5,$data_root/a.wav,0,40000,\\n"
    ... )
    >>> load_manifest(path, "corpus")[0]
    {'wav': 'corpus/a.wav', 'offset': 0.0, 'duration': 2.5, 'place': None}
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no manifest {path}")
    manifest = Manifest.of(_read_rows(path, str(data_root), allow_outside))
    if not len(manifest):
        raise ValueError(f"manifest {path} names no utterance")
    return manifest


def _read_rows(path, data_root, allow_outside):
    """Yields what `Manifest.of` takes, or says what is wrong on which line."""
    seen = set()
    with open(path, newline="", encoding="utf-8") as source:
        reader = csv.reader(source, skipinitialspace=True)
        try:
            header = next(reader, [])
            places = _places(header)
            for row in filter(None, reader):
                if len(row) != len(header):
                    raise ValueError(
                        f"{len(row)} fields under {len(header)} columns; a "
                        "field with a comma needs quotes"
                    )
                name, duration, wav, start, stop, speaker, *shard = (
                    row[place] for place in places
                )
                _check_text("ID", name)
                _check_text("wav", wav)
                if name in seen:
                    raise ValueError(f"ID {name!r} occurs a second time")
                seen.add(name)
                audio = wav.replace("$data_root", data_root, 1)
                span = _span(duration, start, stop)
                place = [_shard_place(*shard)] if shard else []
                if not allow_outside and is_outside(audio, data_root):
                    raise ValueError(
                        f"{wav!r} leads out of the data folder {data_root}. "
                        "Put the audio, or a link to it, there and begin the "
                        "path with $data_root/; or, if you trust this "
                        "manifest, set allow_outside_data_folder: True"
                    )
                yield name, audio, *span, speaker, *place
        except UnicodeDecodeError as error:
            raise ValueError(
                f"manifest {path} is not UTF-8 after line {reader.line_num}: "
                f"{error}"
            ) from error
        except (ValueError, csv.Error) as error:
            raise ValueError(
                f"manifest {path}, line {max(reader.line_num, 1)}: {error}"
            ) from error


def _places(header):
    """Where the columns stand; those of shards last, if there are any."""
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
    return [header.index(column) for column in (*COLUMNS, *shard)]


def _check_text(column, text):
    """Raises ValueError for text that files and logs of ours cannot hold."""
    if not text:
        raise ValueError(f"{column} is empty")
    if CONTROL.search(text):
        raise ValueError(
            f"{column} {text!r} holds a line break or another control character"
        )


def _span(duration, start, stop):
    """Where an utterance begins and how long it is, in seconds."""
    try:
        seconds = float(duration)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"duration {duration!r} is not a number of seconds")
    try:
        first, last = int(start), int(stop)
    except ValueError:
        first = last = 0
    if not 0 <= first < last < 2**62:
        raise ValueError(
            f"start {start!r} and stop {stop!r} must be whole numbers of "
            "samples, start the smaller"
        )
    rate = (last - first) / seconds
    if not RATES[0] < rate < RATES[1]:
        raise ValueError(
            f"from start {start} to stop {stop} in {duration} s would be "
            f"{rate:.3g} samples a second; start and stop count samples at "
            "the file's own rate, duration counts seconds"
        )
    return first / rate, seconds


def _shard_place(first_byte, n_bytes):
    """First byte and number of bytes, as integers."""
    try:
        place = int(first_byte), int(n_bytes)
    except ValueError:
        place = -1, 0
    if not (0 <= place[0] < 2**62 and 0 < place[1] < 2**62):
        raise ValueError(
            f"first_byte {first_byte!r} and n_bytes {n_bytes!r} must be whole "
            "numbers of bytes"
        )
    return place


def held_out(n_utterances, share, seed):
    """Sets aside utterances on which no gradient is taken.

    Arguments
    ---------
    n_utterances : int
        How many there are.
    share : float
        Which part to set aside, between 0 and 1; at least 2 utterances and
        at most 2,000, since pseudo-trials are all their pairs.
    seed : int
        Seed of the draw.

    Returns
    -------
    (numpy.ndarray, numpy.ndarray)
        Rows to train on and rows set aside, both rising, int64.

    Example
    -------
    >>> train, valid = held_out(10, 0.2, seed=1)
    >>> len(train), len(valid)
    (8, 2)
    """
    n_valid = min(max(2, round(share * n_utterances)), 2000)
    chosen = random.Random(seed).sample(range(n_utterances), n_valid)
    aside = np.zeros(n_utterances, dtype=bool)
    aside[chosen] = True
    return np.flatnonzero(~aside), np.flatnonzero(aside)
