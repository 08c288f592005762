"""A sampler for shards, the large tar files that `lgl pack` writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class ShardSampler(Sampler):
    """A random order that reads only `window` shards at a time.

    For storage that caches the neighbourhood of recent reads. Each epoch the
    shards are dealt into windows at random, and a window's utterances are
    shuffled before the next window begins. Speakers must be spread over the
    shards, as `write_shards` does, for a window to be a fair sample of the
    corpus. `shards` is the shard of each item of the dataset, int (N,), see
    `shard_numbers`. As in SpeechBrain's samplers, the order follows from the
    sum of seed and epoch.

    Example
    -------
    >>> sampler = ShardSampler(np.repeat([0, 1, 2], 2), window=1, seed=3)
    >>> order = list(sampler)
    >>> sorted(order)
    [0, 1, 2, 3, 4, 5]
    >>> [index // 2 for index in order][::2]  # shard after shard
    [2, 1, 0]
    """

    def __init__(
        self,
        shards: np.ndarray,
        window: int = 8,
        seed: int = 563375142,
        epoch: int = 0,
    ) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"window is {window}; it must be 1 or more")
        self.shards = np.asarray(shards)
        self.window = window
        self.seed = int(seed)
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.shards)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng(self.seed + self.epoch)
        n_shards = self.shards.max(initial=0) + 1
        n_windows = -(-n_shards // self.window)
        # Windows of even size: a small last window would mix few speakers.
        windows = rng.permutation(n_shards) * n_windows // n_shards
        order = rng.permutation(len(self))
        order = order[np.argsort(windows[self.shards[order]], kind="stable")]
        # In blocks: one list of ten million Python ints would take 400 MB.
        for first in range(0, len(order), 65536):
            yield from order[first : first + 65536].tolist()

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch; without, every epoch has the same order."""
        self.epoch = epoch


def shard_numbers(wavs: Sequence[str]) -> np.ndarray:
    """Numbers files in the order in which they first occur, int64 (N,)."""
    numbers = {}
    return np.fromiter(
        (numbers.setdefault(wav, len(numbers)) for wav in wavs),
        np.int64,
        len(wavs),
    )
