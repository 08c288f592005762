"""Pseudo-labels on disk: a csv of utterance ID and label."""

import csv
import functools
import json
import pathlib
from array import array
from collections.abc import Iterable

import numpy as np

from lgl_plugin.dataio.manifest import CONTROL, Manifest, Strings, version
from lgl_plugin.utils.files import atomic_write

LABELS = "labels.csv"  # in a round's folder `labels`


def write_labels(
    path: str | pathlib.Path, utterances: Iterable[str], labels: np.ndarray
) -> None:
    """Writes N utterances' labels from 0, integers (N,), atomically."""
    with atomic_write(path) as out:
        writer = csv.writer(out)
        writer.writerow(["ID", "label"])
        writer.writerows(zip(utterances, labels.tolist()))


def read_labels(path: str | pathlib.Path) -> tuple[Strings, np.ndarray]:
    """Reads utterance IDs and their labels, int64 (N,), read-only.

    A damaged file raises ValueError, which names the line.
    """
    return _parse(path, version(path))


def round_labels(
    run: pathlib.Path, number: int, manifest: Manifest
) -> np.ndarray:
    """Returns a round's label of each manifest row, int64 (N,), -1 for none."""
    utterances, labels = read_labels(run / f"iter{number}" / "labels" / LABELS)
    by_row = np.full(len(manifest), -1)
    by_row[manifest.rows(utterances)] = labels
    return by_row


def labelled_rows(folder: pathlib.Path, manifest: Manifest) -> np.ndarray:
    """Returns the rows that a user had labelled when a round was clustered.

    The rows are int64. `folder` is the round's folder `labels`; it may be
    missing.
    """
    path = folder / "labels.json"
    facts = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return manifest.rows(facts.get("labelled", ()))


# Each phase and report of a round reads its labels, and the next round compares
# them with its own: two files at a time.
@functools.lru_cache(maxsize=2)
def _parse(path, _version):
    """Parses labels; the file's version serves only as a key of the cache."""
    labels = array("q")

    def names(rows):
        try:
            if next(rows, None) != ["ID", "label"]:
                raise ValueError("the first line must be ID,label")
            for name, label in filter(None, rows):
                labels.append(int(label))
                if labels[-1] < 0 or CONTROL.search(name):
                    raise ValueError(f"{name!r} has the label {label}")
                yield name
        # OverflowError: a label of more than 64 bits.
        except (ValueError, OverflowError, csv.Error) as error:
            raise ValueError(
                f"{path}, line {rows.line_num}: {error}"
            ) from error

    with open(path, newline="", encoding="utf-8") as source:
        utterances = Strings(names(csv.reader(source)))
    # Over bytes, numpy makes a read-only array: all callers share it.
    return utterances, np.frombuffer(labels.tobytes(), np.int64)
