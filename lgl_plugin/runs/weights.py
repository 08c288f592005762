"""Saves and loads a module's weights."""

import contextlib
import errno
import io
import pathlib
import zipfile

import torch
from speechbrain.utils.distributed import main_process_only

from lgl_plugin.utils.files import atomic_write, check_inflation

# Files in a phase's folder and in an exported folder.
ENCODER, CLASSIFIER = "embedding_model.ckpt", "classifier.ckpt"
BACKEND = "backend.npz"  # in a phase's folder
AFFINE = "backend.ckpt"  # the same back-end in an exported folder


@main_process_only
def save_weights(module: torch.nn.Module, path: str | pathlib.Path) -> None:
    """Writes a module's plain state dict, atomically, in the main process."""
    save_tensors(module.state_dict(), path)


def save_tensors(tensors: dict, path: str | pathlib.Path) -> None:
    """Writes tensors for torch.load, atomically, in every calling process."""
    # By a buffer: torch.save to the file itself would hide that the disk is
    # full.
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    with atomic_write(path, "wb") as out:
        out.write(buffer.getbuffer())


def read_tensors(path: str | pathlib.Path) -> dict:
    """Reads what `save_tensors` wrote, without running code.

    Raises ValueError if the file is compressed or was altered. For other faults
    torch.load may raise any error.
    """
    # Checked, because torch.load would inflate 40 kB to 40 MB, and read altered
    # bytes as weights.
    if zipfile.is_zipfile(path):
        check_inflation(path)
        with zipfile.ZipFile(path) as members:
            if altered := members.testzip():
                raise ValueError(
                    f"{altered} in it has been altered: bring the file again"
                )
    return torch.load(path, map_location="cpu", weights_only=True)


def read_weights(path: str | pathlib.Path) -> dict:
    """Reads as `read_tensors` does, but explains every fault by ValueError.

    Only errors of the disk, such as a missing file, stay OSError.
    """
    try:
        return read_tensors(path)
    except ValueError as error:  # of `check_inflation`
        raise ValueError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # torch's message advises to run its code
        # EINVAL: a damaged archive has offsets outside the file.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise ValueError(
            f"{path} cannot be read as a file of weights: it is damaged, cut "
            "off, or holds more than tensors, which is not loaded"
        ) from error


def load_weights(
    module: torch.nn.Module,
    path: str | pathlib.Path,
    tensors: dict | None = None,
) -> torch.nn.Module:
    """Loads a plain state dict, strictly and without running code.

    `tensors` are the file's tensors, if they were read before. Raises
    ValueError if the file cannot be read or does not fit (with the first
    difference), and OSError if it is missing.
    """
    tensors = tensors or read_weights(path)
    try:
        module.load_state_dict(tensors)
    except Exception as error:
        first = str(error).strip().splitlines()[:2]
        raise ValueError(
            f"{path} does not fit the {type(module).__name__} of the yaml "
            f"(another width, or not an encoder): {' '.join(first)}"
        ) from error
    return module


def load_pretrained(module: torch.nn.Module, path: pathlib.Path) -> None:
    """Loads weights to start from; raises what `load_weights` does.

    If the weights do not fit, but a run has exported them, the message names
    the exported folder, which describes their network.
    """
    tensors = read_weights(path)
    try:
        load_weights(module, path, tensors)
    except ValueError as error:
        exported = _export_of(path, tensors)
        if exported is None:
            raise
        raise ValueError(
            f"{error} To start from them, add --pretrained_encoder={exported}"
        ) from error


def _export_of(path, tensors):
    """Returns a run's export of the same weights; None if there is none."""
    for run in path.parents[1:3]:  # of stage1/…, or iter1/gated/…
        for export in sorted(run.glob(f"export/*/{ENCODER}")):
            with contextlib.suppress(Exception):  # damaged, or no weights
                exported = read_weights(export)
                same = (
                    exported[k].equal(tensors[k])
                    for k in {**exported, **tensors}
                )
                if all(same):
                    return export.parent
    return None
