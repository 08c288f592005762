"""Averages the weights of a step's last checkpoints to a new encoder."""

import pathlib

from speechbrain.utils.checkpoints import average_checkpoints

from lgl_plugin.runs.checkpoints import FROZEN, WholeCheckpointer
from lgl_plugin.runs.state import refuse_adaptation
from lgl_plugin.runs.weights import read_tensors, save_tensors

NAMES = ("embedding_model", "classifier")


def average_step(run: str | pathlib.Path, step: str, n_epochs: int) -> str:
    """Averages the weights of a step's last epochs, by SpeechBrain's function.

    The setting `selection` chose the epochs; by default they are the last.
    Means and variances of batch normalisation are averaged like weights.
    Returns the name of the new folder in the run's, which `export` takes as a
    step. Raises ValueError if fewer epochs were kept, or the folder is that of
    an `lgl adapt`.
    """
    run = pathlib.Path(run)
    refuse_adaptation(run)
    folder = run / step / "checkpoints"
    checkpoints = []
    if folder.is_dir():
        checkpoints = WholeCheckpointer(folder).find_checkpoints(
            min_key="criterion", max_num_checkpoints=n_epochs
        )
    number = len(checkpoints)
    if number < n_epochs:
        instead = f"take --average={number}" if number > 1 else "leave it out"
        raise ValueError(
            f"{run / step} has checkpoints of {number} epochs, and "
            f"--average={n_epochs} asks for more: {instead}. A step that is "
            "done keeps no others: to have them, train it in another "
            f"--output_folder with --keep_checkpoints={n_epochs} and as many "
            "epochs"
        )
    name = f"{step}/average{n_epochs}"
    for part in NAMES:
        if part in checkpoints[0].paramfiles:
            mean = average_checkpoints(
                checkpoints, part, lambda path, **_: read_tensors(path)
            )
            whole = run / step / f"{part}.ckpt"
            if whole.exists():
                mean = {**read_tensors(whole), **mean}
            elif checkpoints[0].paramfiles[part].with_suffix(FROZEN).exists():
                raise ValueError(
                    f"{run / step} is not finished: its checkpoints lack the "
                    "frozen weights, which only a finished step has"
                )
            save_tensors(mean, run / name / f"{part}.ckpt")
    return name
