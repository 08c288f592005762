"""Stores log-mel frames of a corpus, computed once for many trainings."""

import pathlib
from collections.abc import Iterable

import numpy as np
import torch

from lgl_plugin.nnet.features import KaldiFbank
from lgl_plugin.utils.files import atomic_write

N_MELS = 80


class LogMels:
    """Frames of utterances in one memory map that `write_log_mels` wrote.

    Arguments
    ---------
    folder : str or pathlib.Path
        The folder of `write_log_mels`.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> write_log_mels([torch.randn(16000)], folder)
    >>> log_mels = LogMels(folder)
    >>> len(log_mels), log_mels[0].shape
    (1, torch.Size([98, 80]))
    """

    def __init__(self, folder: str | pathlib.Path):
        folder = pathlib.Path(folder)
        self.ends = np.load(folder / "ends.npy")
        frames = np.memmap(folder / "frames.f16", np.float16, "r")
        self.frames = frames.reshape(-1, N_MELS)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> torch.Tensor:
        """Returns an utterance's frames (time, 80), float32."""
        row = range(len(self))[row]  # IndexError ends an iteration
        start = self.ends[row - 1] if row else 0
        frames = self.frames[start : self.ends[row]]
        return torch.from_numpy(frames.astype(np.float32))

    def crop(
        self, row: int, length: int, rng: np.random.Generator
    ) -> torch.Tensor:
        """Returns a random crop (length, 80); short utterances are repeated."""
        frames = self[row]
        frames = frames.repeat(-(-length // len(frames)), 1)
        start = rng.integers(len(frames) - length + 1)
        return frames[start : start + length]


@torch.no_grad()
def write_log_mels(
    waveforms: Iterable[torch.Tensor], folder: str | pathlib.Path
) -> None:
    """Writes the log-mel frames of waveforms, in their order.

    Arguments
    ---------
    waveforms : iterable of torch.Tensor
        At 16 kHz, shape (samples,), float32 in [-1, 1]; at least 25 ms each.
    folder : str or pathlib.Path
        Where to write. If the frames are there already, nothing is done.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> write_log_mels([torch.randn(16000)], folder)
    >>> sorted(path.name for path in folder.iterdir())
    ['ends.npy', 'frames.f16']
    """
    folder = pathlib.Path(folder)
    if (folder / "ends.npy").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    fbank, lengths = KaldiFbank(N_MELS), []
    with atomic_write(folder / "frames.f16", "wb") as out:
        for waveform in waveforms:
            # Kaldi's features are defined for samples of 16 bits.
            frames = fbank(waveform[None] * 2**15)[0]
            lengths.append(len(frames))
            out.write(frames.numpy().astype(np.float16).tobytes())
    with atomic_write(folder / "ends.npy", "wb") as out:
        np.save(out, np.cumsum(lengths))
