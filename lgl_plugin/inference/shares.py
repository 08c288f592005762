"""Saves each rank's embeddings so far, so that an extraction can resume."""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import time
from collections.abc import Iterable

import numpy as np
import torch

from lgl_plugin.utils.distributed import rank, world_size
from lgl_plugin.utils.files import atomic_write, load_arrays

# Attributes of a share that are saved, beside the positions.
PROGRESS = ("key", "batches", "n_bytes", "bad")


class Share:
    """A rank's embeddings of an extraction, and their positions in the whole.

    On disk a share is `.share<rank>.bin`, the vectors, and `.share<rank>.npz`,
    the progress, up to which the vectors are valid. Without a folder it is in
    memory. It is saved every `save_seconds`. Vectors that were saved under
    another `key` are discarded. `batches` counts the finished batches. `bad`
    has the positions of utterances without an embedding, with the reason.
    """

    def __init__(
        self,
        folder: str | pathlib.Path | None,
        key: str,
        save_seconds: float = 600.0,
    ):
        self.key, self.save_seconds = key, save_seconds
        self.path, self.file = None, io.BytesIO()
        self.begin()
        if folder:
            folder = pathlib.Path(folder)
            folder.mkdir(parents=True, exist_ok=True)
            self.path = folder / f".share{rank()}.bin"
            self._resume()
        self.saved_at = time.monotonic()

    def begin(self) -> None:
        """Begins anew, and discards what an earlier process saved."""
        self.batches, self.n_bytes = 0, 0
        self.placed, self.bad = [np.empty(0, np.int64)], []
        self.file.truncate(0)
        if self.path:
            self.path.with_suffix(".npz").unlink(missing_ok=True)

    def _resume(self):
        """Opens the file, and resumes what was saved under the same key."""
        # A missing or damaged .npz, or too short a .bin, means a fresh start.
        with contextlib.suppress(OSError, ValueError, KeyError):
            saved = load_arrays(self.path.with_suffix(".npz"))
            progress, placed = json.loads(str(saved["known"])), saved["placed"]
            size = self.path.stat().st_size
            if progress["key"] == self.key and size >= progress["n_bytes"]:
                progress["bad"] = [tuple(bad) for bad in progress["bad"]]
                # Only these names: a damaged file may have others.
                progress = {name: progress[name] for name in PROGRESS}
                vars(self).update(progress, placed=[placed])
        if not self.n_bytes:  # or old progress would vouch for new vectors
            self.path.with_suffix(".npz").unlink(missing_ok=True)
        self.file = open(self.path, "ab")
        # A killed process may have appended vectors after its last save.
        self.file.truncate(self.n_bytes)

    def add(
        self, positions: np.ndarray, vectors: np.ndarray, bad: list
    ) -> None:
        """Adds a batch: positions (n,), int64, and embeddings (n, D).

        `bad` are (position, reason) of utterances that failed. `vectors` may be
        None if `positions` is empty.
        """
        self.batches += 1
        self.bad.extend(bad)
        if len(positions):
            self.placed.append(positions)
            self.n_bytes += vectors.nbytes
            self.file.write(vectors.tobytes())
        if time.monotonic() - self.saved_at >= self.save_seconds:
            self.save()

    def save(self) -> None:
        """Writes vectors and progress to disk, if there is a folder."""
        if not self.path:
            return
        # The vectors first: the progress must not count bytes that a power
        # cut would lose.
        self.file.flush()
        os.fsync(self.file.fileno())
        progress = {name: getattr(self, name) for name in PROGRESS}
        placed = self.positions()
        with atomic_write(self.path.with_suffix(".npz"), "wb") as out:
            np.savez(out, known=json.dumps(progress), placed=placed)
        self.saved_at = time.monotonic()

    def positions(self) -> np.ndarray:
        """Returns the positions of all vectors, int64 (n,)."""
        return np.concatenate(self.placed)

    def close(self) -> bytes | str:
        """Returns the bytes of the vectors, or the path of their file."""
        if not self.path:
            return self.file.getvalue()
        self.file.close()
        return str(self.path)


class JoinedShares:
    """All ranks' vectors, float32, read by slices in the utterances' order.

    A share is (positions, bytes or path), with at least one vector.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, shares: Iterable[tuple]):
        positions, vectors = zip(*shares)
        sizes = [len(part) for part in positions]
        self.parts = [
            np.memmap(part, self.dtype, "r").reshape(size, -1)
            if isinstance(part, str)
            else np.frombuffer(part, self.dtype).reshape(size, -1)
            for part, size in zip(vectors, sizes)
        ]
        order = np.argsort(np.concatenate(positions))
        self.positions = np.concatenate(positions)[order]
        # The share that has each utterance's vector, and its row in the share.
        self.source = np.repeat(np.arange(len(sizes)), sizes)[order]
        self.row = np.concatenate([np.arange(size) for size in sizes])[order]
        self.shape = len(order), self.parts[0].shape[1]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, rows: slice) -> np.ndarray:
        source, row = self.source[rows], self.row[rows]
        vectors = np.empty((len(row), self.shape[1]), self.dtype)
        for number, part in enumerate(self.parts):
            vectors[source == number] = part[row[source == number]]
        return vectors


def fingerprint(*parts: torch.nn.Module | np.ndarray | object) -> str:
    """Computes a checksum of all on which an extraction's result depends.

    Of modules, it covers repr, weights and plain attributes, of arrays the
    bytes, of other objects the repr; and it covers the number of ranks.
    """
    digest = hashlib.sha256(str(world_size()).encode())
    for part in parts:
        if isinstance(part, torch.nn.Module):
            digest.update(repr(part).encode())  # has strides, dilations, …
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


def remove_shares(folder: str | pathlib.Path) -> None:
    """Removes the files of all ranks, once the store is complete."""
    for path in pathlib.Path(folder).glob(".share*"):
        path.unlink()
