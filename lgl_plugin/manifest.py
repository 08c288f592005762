"""The manifest in memory: columns of numbers and text, one block each.

A Python object per utterance would cost a gigabyte at a million of them, and
once more in every loader process, because reading an object writes to its
reference count. Arrays are shared with processes that fork.
"""

import collections.abc
import csv
import dataclasses
import random
from array import array

import numpy as np


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


def load_manifest(path, data_root):
    """Reads a manifest.

    Arguments
    ---------
    path : str or pathlib.Path
        A csv with the columns ID, duration, wav, start, stop, spk_id, and
        first_byte and n_bytes if the audio lies in shards.
    data_root : str
        What stands for `$data_root` in it.

    Returns
    -------
    Manifest

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
    needed = ["ID", "duration", "wav", "start", "stop", "spk_id"]

    def rows(source):
        reader = csv.reader(source, skipinitialspace=True)
        header = next(reader)
        columns = [header.index(name) for name in needed]
        if "first_byte" in header:
            columns += [header.index("first_byte"), header.index("n_bytes")]
        for row in filter(None, reader):
            name, duration, wav, start, stop, speaker, *place = (
                row[column] for column in columns
            )
            duration, start, stop = float(duration), int(start), int(stop)
            yield (
                name,
                wav.replace("$data_root", str(data_root), 1),
                # Start and stop count samples at the file's own rate.
                duration * start / (stop - start),
                duration,
                speaker,
                *([tuple(map(int, place))] if place else []),
            )

    with open(path, newline="", encoding="utf-8") as source:
        return Manifest.of(rows(source))


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
