"""Saves and loads a module's weights."""

import io

import torch
from speechbrain.utils.distributed import main_process_only

from lgl_plugin.utils.files import atomic_write


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
