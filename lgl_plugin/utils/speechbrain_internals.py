"""SpeechBrain's private names that the package uses, all in one place.

A release of SpeechBrain may change them without notice;
tests/utils/test_speechbrain_internals.py then names the one that is gone.
"""

from __future__ import annotations

import pathlib

from speechbrain.utils.checkpoints import Checkpoint, Checkpointer


def checkpoint_folders(checkpointer: Checkpointer) -> list[pathlib.Path]:
    """Returns the folders of a checkpointer's checkpoints, without reading."""
    return checkpointer._list_checkpoint_dirs()


def read_checkpoints(folders: list[pathlib.Path]) -> list[Checkpoint]:
    """Reads what the metadata of checkpoints says of them."""
    return Checkpointer._construct_checkpoint_objects(folders)
