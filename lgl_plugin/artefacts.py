"""What steps leave: weights, arrays and pseudo-labels, whole or absent."""

import csv
import io
from array import array

import numpy as np
import torch
from speechbrain.utils.distributed import main_process_only

from lgl_plugin.files import atomic_write
from lgl_plugin.manifest import CONTROL, Strings


@main_process_only
def save_weights(module, path):
    """Writes a module's plain state dict, atomically.

    Example
    -------
    >>> path = getfixture("tmp_path") / "encoder.ckpt"
    >>> save_weights(torch.nn.Linear(2, 3), path)
    >>> torch.load(path, weights_only=True)["weight"].shape
    torch.Size([3, 2])
    """
    whole = io.BytesIO()  # torch hides from the file that a disk is full
    torch.save(module.state_dict(), whole)
    with atomic_write(path, "wb") as out:
        out.write(whole.getbuffer())


def load_weights(module, path):
    """Loads a plain state dict, strictly.

    Returns
    -------
    torch.nn.Module
        The same module.

    Raises
    ------
    ValueError
        If the file does not fit the module; names the first difference.

    Example
    -------
    >>> path = getfixture("tmp_path") / "embedding_model.ckpt"
    >>> save_weights(torch.nn.Linear(2, 3), path)
    >>> load_weights(torch.nn.Linear(2, 3), path)
    Linear(in_features=2, out_features=3, bias=True)
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        module.load_state_dict(weights)
    except Exception as error:
        first = str(error).strip().splitlines()[:2]
        raise ValueError(
            f"{path} does not fit the {type(module).__name__} of the yaml "
            f"(another width, or not an encoder): {' '.join(first)}"
        ) from error
    return module


@main_process_only
def save_arrays(path, **arrays):
    """Writes arrays as an npz file, atomically.

    Example
    -------
    >>> path = getfixture("tmp_path") / "gate.npz"
    >>> save_arrays(path, losses=np.array([0.5, 9.0]), tau=1.0)
    >>> with np.load(path) as arrays:
    ...     arrays["losses"] <= arrays["tau"]
    array([ True, False])
    """
    with atomic_write(path, "wb") as out:
        np.savez(out, **arrays)


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
    (lgl_plugin.manifest.Strings, numpy.ndarray)
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
