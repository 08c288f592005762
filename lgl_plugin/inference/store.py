"""A store of embeddings on disk, memory-mapped."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Collection

import numpy as np

from lgl_plugin.dataio.manifest import Strings, find
from lgl_plugin.utils.files import atomic_write

ROWS = 65536  # copied at once


@dataclasses.dataclass
class Embeddings:
    """Embeddings with the utterances that they belong to.

    Arguments
    ---------
    utterances : Strings
        IDs.
    vectors : numpy.ndarray, (N, D), float32
        Not normalised. To save them, any object with shape, dtype and slices
        will do.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> vectors = np.eye(2, dtype=np.float32)
    >>> Embeddings(Strings(["a", "b"]), vectors).save(folder)
    >>> Embeddings.load(folder).vectors_of(["b"])
    array([[0., 1.]], dtype=float32)
    """

    utterances: Strings
    vectors: np.ndarray

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes `utterances.txt` and `vectors.npy` into a folder."""
        folder = pathlib.Path(folder)
        header = {
            "descr": np.lib.format.dtype_to_descr(self.vectors.dtype),
            "fortran_order": False,
            "shape": self.vectors.shape,
        }
        # np.save would first copy all vectors of all ranks into memory.
        with atomic_write(folder / "vectors.npy", "wb") as out:
            np.lib.format.write_array_header_1_0(out, header)
            for start in range(0, len(self.vectors), ROWS):
                out.write(self.vectors[start : start + ROWS].tobytes())
        with atomic_write(folder / "utterances.txt", "wb") as out:
            self.utterances.save(out)

    @classmethod
    def load(cls, folder: str | pathlib.Path) -> Embeddings:
        """Opens a saved folder; the vectors stay on disk until used.

        Raises FileNotFoundError if a file is missing, ValueError if one is
        damaged.
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
        except Exception as error:
            # numpy parses the header as Python, which can raise SyntaxError and
            # others.
            raise ValueError(f"{folder} is damaged: {error}") from error
        return cls(utterances, vectors)

    def vectors_of(self, utterances: Collection[str]) -> np.ndarray:
        """Returns the vectors of some utterances, in their order.

        Raises KeyError if an utterance has no vector.
        """
        return self.vectors[find(self.utterances, utterances)]
