"""Embeddings on disk, memory-mapped."""

import dataclasses
import pathlib

import numpy as np
from speechbrain.utils.logger import get_logger

from lgl_plugin.dataio.manifest import Strings, find
from lgl_plugin.utils.files import atomic_write

logger = get_logger(__name__)

ROWS = 65536  # that are copied at once


@dataclasses.dataclass
class Embeddings:
    """Embeddings with the utterances that they belong to.

    Arguments
    ---------
    utterances : Strings
        IDs.
    vectors : numpy.ndarray
        Shape (n_utterances, dim), float32 or float16, not normalised.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> vectors = np.eye(2, dtype=np.float32)
    >>> Embeddings(Strings(["a", "b"]), vectors).save(folder)
    >>> Embeddings.load(folder).rows(["b"])
    array([[0., 1.]], dtype=float32)
    """

    utterances: Strings
    vectors: np.ndarray

    def save(self, folder):
        """Writes `utterances.txt` and `vectors.npy` into a folder."""
        folder = pathlib.Path(folder)
        with atomic_write(folder / "vectors.npy", "wb") as out:
            np.lib.format.write_array_header_1_0(
                out,
                {
                    "descr": np.lib.format.dtype_to_descr(self.vectors.dtype),
                    "fortran_order": False,
                    "shape": self.vectors.shape,
                },
            )
            for start in range(0, len(self.vectors), ROWS):
                out.write(self.vectors[start : start + ROWS].tobytes())
        with atomic_write(folder / "utterances.txt", "wb") as out:
            self.utterances.save(out)

    @classmethod
    def load(cls, folder):
        """Opens what `save` wrote; the vectors stay on disk until used.

        Raises
        ------
        ValueError
            If it is damaged.
        """
        folder = pathlib.Path(folder)
        utterances = Strings.load(folder / "utterances.txt")
        try:
            vectors = np.load(folder / "vectors.npy", mmap_mode="r")
            if vectors.ndim != 2 or len(vectors) != len(utterances):
                raise ValueError(
                    f"{len(utterances)} utterances, vectors {vectors.shape}"
                )
        except FileNotFoundError:
            raise
        except Exception as error:  # numpy reads the header as Python
            raise ValueError(f"{folder} is damaged: {error}") from error
        return cls(utterances, vectors)

    def rows(self, utterances):
        """The vectors of some utterances, in their order."""
        return self.vectors[find(self.utterances, utterances)]


class _Joined:
    """The vectors of all ranks in the order of the utterances, by slices."""

    def __init__(self, shares, dtype):
        positions, dims, vectors = zip(*shares)
        self.parts = [
            np.memmap(part, dtype, "r").reshape(-1, dims[0])
            if isinstance(part, str)
            else np.frombuffer(part, dtype).reshape(-1, dims[0])
            for part in vectors
        ]
        self.starts = np.cumsum([0] + [len(part) for part in self.parts])
        positions = np.concatenate(positions)
        self.order = np.argsort(positions)
        self.positions = positions[self.order]
        self.shape, self.dtype = (len(positions), dims[0]), dtype

    def __len__(self):
        return len(self.order)

    def __getitem__(self, rows):
        wanted = self.order[rows]
        found = np.empty((len(wanted), self.shape[1]), self.dtype)
        source = np.searchsorted(self.starts, wanted, side="right") - 1
        for number, part in enumerate(self.parts):
            own = source == number
            found[own] = part[wanted[own] - self.starts[number]]
        return found
