"""Reading from shards, the large tar files that `pack` writes."""

import numpy as np
from torch.utils.data import Sampler


class ShardSampler(Sampler):
    """Random order in which only a few shards are read at a time.

    For storage that caches what is near to what was read. Shards are dealt
    anew into windows each epoch, and a window's utterances are shuffled
    before the next window begins. Speakers must be spread over the shards, as
    `pack` does, for a window to be a fair sample of the corpus.

    Arguments
    ---------
    shards : numpy.ndarray
        The shard of each item of the dataset, int (N,); see `shard_numbers`.
    window : int
        How many shards at a time.
    seed : int
        The base seed. As in SpeechBrain's samplers, the order follows from
        seed and epoch.
    epoch : int
        The epoch to start at.

    Example
    -------
    >>> sampler = ShardSampler(np.repeat([0, 1, 2], 2), window=1, seed=3)
    >>> order = list(sampler)
    >>> sorted(order)
    [0, 1, 2, 3, 4, 5]
    >>> [index // 2 for index in order][::2]  # shard after shard
    [2, 1, 0]
    """

    def __init__(self, shards, window=8, seed=563375142, epoch=0):
        super().__init__()
        if window < 1:
            raise ValueError(f"window is {window}; it must be 1 or more")
        self.shards = np.asarray(shards)
        self.window = window
        self.seed = int(seed)
        self.epoch = epoch

    def __len__(self):
        return len(self.shards)

    def __iter__(self):
        rng = np.random.default_rng(self.seed + self.epoch)
        n_shards = self.shards.max(initial=0) + 1
        n_windows = -(-n_shards // self.window)
        # Windows as even as can be: a small last one would mix little.
        windows = rng.permutation(n_shards) * n_windows // n_shards
        order = rng.permutation(len(self))
        order = order[np.argsort(windows[self.shards[order]], kind="stable")]
        for first in range(0, len(order), 65536):
            yield from order[first : first + 65536].tolist()

    def set_epoch(self, epoch):
        """What to call before each epoch, lest it repeats the last order."""
        self.epoch = epoch


def shard_numbers(wavs):
    """Numbers the audio files of a manifest as they first occur.

    Arguments
    ---------
    wavs : collection of str
        The file of each utterance.

    Returns
    -------
    numpy.ndarray
        int64 (N,).

    Example
    -------
    >>> shard_numbers(["b.tar", "a.tar", "b.tar"])
    array([0, 1, 0])
    """
    numbers = {}
    return np.fromiter(
        (numbers.setdefault(wav, len(numbers)) for wav in wavs),
        np.int64,
        len(wavs),
    )
