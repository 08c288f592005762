"""What one process has embedded so far, kept so that a restart goes on."""

import contextlib
import hashlib
import json
import os
import pathlib
import time

import numpy as np
import torch

from lgl_plugin.utils.distributed import rank, world_size
from lgl_plugin.utils.files import atomic_write


class Share:
    """The vectors of one process of an extraction, and where they belong.

    On disk it is `.share<rank>.bin`, the vectors, and `.share<rank>.npz`, how
    far they are whole; without a folder it is in memory.

    Arguments
    ---------
    folder : str or pathlib.Path, optional
        Where to keep it.
    key : str
        What the vectors follow from; what another key left is thrown away.
    every : float
        Seconds between the times that it is kept.

    Attributes
    ---------
    batches : int
        How many batches are done.
    bad : list of (int, str)
        Positions of utterances without a vector, and why.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> share = Share(folder, "encoder 1", every=0.0)
    >>> share.add(np.array([4, 2]), np.eye(2, dtype=np.float32), [])
    >>> again = Share(folder, "encoder 1")  # after a crash
    >>> again.batches, again.positions()
    (1, array([4, 2]))
    >>> Share(folder, "encoder 2").batches
    0
    """

    def __init__(self, folder, key, every=600.0):
        self.key, self.every = key, every
        self.batches, self.dim = 0, 0
        self.placed, self.bad = [np.empty(0, np.int64)], []
        self.vectors, self.n_bytes = [], 0
        self.path = None
        if folder:
            folder = pathlib.Path(folder)
            folder.mkdir(parents=True, exist_ok=True)
            self.path = folder / f".share{rank()}.bin"
            self._go_on()
        self.kept = time.monotonic()

    def _go_on(self):
        """Takes up what an earlier process kept, if it is of the same key."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            with np.load(self.path.with_suffix(".npz")) as kept:
                known = json.loads(str(kept["known"]))
                placed = kept["placed"]
            if (
                known["key"] == self.key
                and self.path.stat().st_size >= known["bytes"]
            ):
                self.batches, self.dim = known["batches"], known["dim"]
                self.bad = [tuple(bad) for bad in known["bad"]]
                self.placed = [placed]
                self.n_bytes = known["bytes"]
        self.file = open(self.path, "ab")
        self.file.truncate(self.n_bytes)

    def add(self, positions, vectors, bad):
        """Adds a batch.

        Arguments
        ---------
        positions : numpy.ndarray
            Places of its utterances among all, int64 (n,).
        vectors : numpy.ndarray
            Their embeddings (n, dim).
        bad : list of (int, str)
            Places of its utterances that have none, and why.
        """
        self.batches += 1
        self.bad.extend(bad)
        if len(positions):
            self.placed.append(positions)
            self.dim = vectors.shape[1]
            self.n_bytes += vectors.nbytes
            if self.path:
                self.file.write(vectors.tobytes())
            else:
                self.vectors.append(vectors.tobytes())
        if time.monotonic() - self.kept >= self.every:
            self.keep()

    def keep(self):
        """Puts on disk how far it has come, if it has a folder."""
        if not self.path:
            return
        self.file.flush()
        os.fsync(self.file.fileno())
        known = {
            "key": self.key,
            "batches": self.batches,
            "dim": self.dim,
            "bytes": self.n_bytes,
            "bad": self.bad,
        }
        placed = self.positions()
        with atomic_write(self.path.with_suffix(".npz"), "wb") as out:
            np.savez(out, known=json.dumps(known), placed=placed)
        self.kept = time.monotonic()

    def positions(self):
        """Places of all its vectors, int64 (n,)."""
        return np.concatenate(self.placed)

    def whole(self):
        """The vectors' bytes, or the path of the file that holds them."""
        if not self.path:
            return b"".join(self.vectors)
        self.file.close()
        return str(self.path)


def key_of(*parts):
    """A checksum of what an extraction follows from.

    Arguments
    ---------
    *parts : torch.nn.Module, numpy.ndarray or plain value
        Modules count by their weights and plain attributes.

    Returns
    -------
    str

    Example
    -------
    >>> key_of(np.arange(3), "bf16") == key_of(np.arange(3), "fp32")
    False
    """
    digest = hashlib.sha256(str(world_size()).encode())
    for part in parts:
        if hasattr(part, "state_dict"):
            for name, module in part.named_modules():
                plain = {
                    key: value
                    for key, value in vars(module).items()
                    if isinstance(value, bool | int | float | str)
                    and key != "training"
                }
                digest.update(f"{name} {type(module)} {plain}".encode())
            for name, value in part.state_dict().items():
                digest.update(name.encode())
                value = value.detach().cpu().flatten().view(torch.uint8)
                digest.update(value.numpy().tobytes())
        elif isinstance(part, np.ndarray):
            digest.update(np.ascontiguousarray(part).tobytes())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()


def remove_shares(folder):
    """Removes what all processes have kept, once the store is whole.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> Share(folder, "key").keep()
    >>> remove_shares(folder)
    >>> list(folder.iterdir())
    []
    """
    for path in pathlib.Path(folder).glob(".share*"):
        path.unlink()
