"""What steps leave: weights, arrays and pseudo-labels, whole or absent."""

import csv
from array import array

import numpy as np

from lgl_plugin.dataio.manifest import CONTROL, Strings
from lgl_plugin.utils.files import atomic_write


def write_labels(path, utterances, labels):
    """Writes pseudo-labels as a csv of ID and label, atomically.

    Example
    -------
    >>> path = getfixture("tmp_path") / "labels.csv"
    >>> write_labels(path, ["a.wav", "b.wav"], torch.tensor([4, 0]))
    >>> path.read_text().splitlines()
    ['ID,label', 'a.wav,4', 'b.wav,0']
    """
    with atomic_write(path) as out:
        writer = csv.writer(out)
        writer.writerow(["ID", "label"])
        writer.writerows(zip(utterances, labels.tolist()))


def read_labels(path):
    """Reads what `write_labels` wrote.

    Returns
    -------
    (lgl_plugin.dataio.manifest.Strings, numpy.ndarray)
        Utterance IDs and their labels, int64 (N,).

    Raises
    ------
    ValueError
        If the file is damaged; names the line.

    Example
    -------
    >>> path = getfixture("tmp_path") / "labels.csv"
    >>> write_labels(path, ["a.wav", "b.wav"], torch.tensor([4, 0]))
    >>> names, labels = read_labels(path)
    >>> list(names), labels
    (['a.wav', 'b.wav'], array([4, 0]))
    """
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
        except (ValueError, OverflowError, csv.Error) as error:
            raise ValueError(
                f"{path}, line {rows.line_num}: {error}"
            ) from error

    with open(path, newline="", encoding="utf-8") as source:
        names = Strings(names(csv.reader(source)))
    return names, np.frombuffer(labels, np.int64)
