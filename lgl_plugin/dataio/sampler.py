"""The order in which training reads its utterances."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class PassSampler(Sampler):
    """An endless stream of passes over a dataset, cut into epochs.

    Each pass has every utterance once, in an order of its own. An epoch of
    `length` items continues where the previous epoch ended, so that the
    numbers of visits of any two utterances differ by one at most. An index is
    an item's place in the dataset plus `size` for each previous pass;
    `UtteranceDataset` draws other crops in each pass.

    With `classes`, int (size,), a pass draws with replacement, so that each
    class is as likely as any other, whatever its size: class-balanced sampling.
    A pass may then repeat an utterance or leave it out.

    With `shards`, int (size,), see `shard_numbers`, a pass reads only `window`
    shards at a time, for storage that caches the neighbourhood of recent
    reads. Shards are dealt into windows at random, and the utterances of a
    window are shuffled. A window is a fair sample of the corpus only if
    speakers are spread over the shards, as by `write_shards`. Second crops of
    other utterances (`Partners`) are read from any shard.
    """

    window = 8

    def __init__(
        self,
        size: int,
        length: int,
        seed: int = 0,
        shards: np.ndarray | None = None,
        classes: np.ndarray | None = None,
    ) -> None:
        super().__init__()
        self.size = size
        self.length = length
        self.seed = int(seed)
        self.shards = None if shards is None else np.asarray(shards)
        self.weights = None
        if classes is not None:
            _, place, sizes = np.unique(
                classes, return_inverse=True, return_counts=True
            )
            self.weights = 1 / (len(sizes) * sizes[place])
        self.epoch = 1

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        place = (self.epoch - 1) * self.length
        end = place + self.length
        while place < end:
            turn, first = divmod(place, self.size)
            order = self._order(turn)[first : first + end - place]
            place += len(order)
            # In blocks: one list of ten million ints would take 400 MB.
            for block in range(0, len(order), 65536):
                indices = order[block : block + 65536] + turn * self.size
                yield from indices.tolist()

    def _order(self, turn):
        """Returns the order of a pass, int64 (size,)."""
        rng = np.random.default_rng([self.seed, turn])
        if self.shards is None:
            return self._draw(rng)
        n_shards = self.shards.max(initial=0) + 1
        n_windows = -(-n_shards // self.window)
        # Windows of even size: a small last window would mix few speakers.
        windows = rng.permutation(n_shards) * n_windows // n_shards
        order = self._draw(rng)
        return order[np.argsort(windows[self.shards[order]], kind="stable")]

    def _draw(self, rng):
        """Returns a pass's utterances in random order, int64 (size,)."""
        if self.weights is None:
            return rng.permutation(self.size)
        return rng.choice(self.size, self.size, p=self.weights)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, from 1."""
        self.epoch = epoch


def shard_numbers(wavs: Sequence[str]) -> np.ndarray:
    """Numbers files in the order in which they first occur, int64 (N,)."""
    numbers = {}
    return np.fromiter(
        (numbers.setdefault(wav, len(numbers)) for wav in wavs),
        np.int64,
        len(wavs),
    )
