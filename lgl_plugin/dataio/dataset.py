"""Datasets over manifests: random crops, without decoding whole files.

An utterance is read as one crop (Stage II), as two disjoint crops (Stage I)
or whole (extraction). Bad audio never reaches the network: in training the
next utterance takes its place, and either way `BadFiles` names it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence

import numpy as np
import torch
from speechbrain.dataio.dataset import DynamicItemDataset

from lgl_plugin.dataio.audio import BadAudio, read_first_sound, read_spans, wrap
from lgl_plugin.dataio.manifest import Manifest


def crop_spans(
    duration: float, crop: float, n_crops: int, rng: random.Random
) -> list[tuple[float, float]]:
    """Draws start and length of disjoint crops, all in seconds.

    With room for all crops, their positions are uniformly random; a shorter
    utterance is cut into equal parts, which `read_crops` repeats to full
    length. The order is random too: if one view of Stage I were always the
    earlier one, the encoder could tell them apart (paper, section 2.1).
    """
    length = min(crop, duration / n_crops)
    slack = max(duration - n_crops * length, 0.0)
    # Sorted cuts of the slack are the gaps between crops laid end to end.
    cuts = sorted(rng.uniform(0.0, slack) for _ in range(n_crops))
    spans = [(cut + i * length, length) for i, cut in enumerate(cuts)]
    rng.shuffle(spans)
    return spans


def read_crops(
    path: str | os.PathLike,
    offset: float,
    duration: float,
    crop: float,
    n_crops: int = 1,
    sample_rate: int = 16000,
    rng: random.Random = random,
    place: Sequence[int] | None = None,
) -> torch.Tensor:
    """Reads random disjoint crops of the utterance at `offset` in a file.

    Returns float32 (n_crops, crop * sample_rate); offset, duration and crop
    are in seconds. A crop of zeros alone is replaced by one around the first
    sound of the utterance; `BadAudio` is raised if there is none.
    """
    n_samples = round(crop * sample_rate)
    spans = crop_spans(duration, crop, n_crops, rng)
    spans = [(offset + start, seconds) for start, seconds in spans]
    crops = read_spans(path, spans, sample_rate, place)
    for index, wav in enumerate(crops):
        if not wav.any():
            wav = read_first_sound(path, offset, duration, sample_rate, place)
            crops[index] = _loudest_crop(wav, n_samples)
    return torch.stack([wrap(wav, n_samples) for wav in crops])


def _loudest_crop(wav: torch.Tensor, n_samples: int) -> torch.Tensor:
    """Cuts `n_samples` around the sample of the largest magnitude."""
    peak = int(wav.abs().argmax())
    start = max(0, min(peak - n_samples // 2, len(wav) - n_samples))
    return wav[start : start + n_samples]


class UtteranceDataset(DynamicItemDataset):
    """A DynamicItemDataset over a manifest that survives bad audio.

    An utterance whose reading raises `BadAudio` is replaced by the one that
    follows, so that batches keep their size. The bad ones' names travel with
    the item under the key `bad`, lines of `ID<TAB>reason` (text, because
    SpeechBrain's batches would transpose a list). The other keys are id, row
    (in the manifest) and those of `Manifest`.

    Arguments
    ---------
    manifest : lgl_plugin.dataio.manifest.Manifest
        The corpus; forked loader processes share its memory.
    rows : numpy.ndarray
        The rows of its utterances to use, int64; at least one.

    Attributes
    ----------
    epoch : torch.Tensor
        The epoch that items are drawn for, int64 (), in memory that loader
        processes share.

    Example
    -------
    >>> def read(wav):
    ...     if wav == "broken":
    ...         raise BadAudio("cannot be read")
    ...     return wav
    >>> manifest = Manifest.of(
    ...     [("a", "broken", 0.0, 1.0, ""), ("b", "ok", 0.0, 1.0, "")]
    ... )
    >>> data = UtteranceDataset(manifest, np.arange(2))
    >>> data.add_dynamic_item(read, takes="wav", provides="sig")
    >>> data.set_output_keys(["id", "sig"])
    >>> data[0]
    {'id': 'b', 'sig': 'ok', 'bad': 'a\\tcannot be read'}
    """

    def __init__(self, manifest: Manifest, rows: np.ndarray) -> None:
        first = int(rows[0])
        # SpeechBrain would make a list of a million Python objects, copied by
        # every loader process. One row tells it the keys; the attributes then
        # point to the manifest, whose arrays the processes share.
        super().__init__({first: {"row": first, **manifest[first]}})
        self.data, self.data_ids = manifest, rows
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch to draw for; without, every epoch's are the same."""
        # In place: persistent loader processes see only the shared memory.
        self.epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict:
        if index >= len(self):
            # Python's iteration ends at IndexError; the modulo below has none.
            raise IndexError(f"{index} of {len(self)} utterances")
        bad = []
        for step in range(len(self)):
            row = int(self.data_ids[(index + step) % len(self)])
            utterance = self.data.ids[row]
            try:
                item = self.pipeline.compute_outputs(
                    {"id": utterance, "row": row, **self.data[row]}
                )
            except BadAudio as error:
                reason = " ".join(str(error).split())
                bad.append(f"{utterance}\t{reason}")
            else:
                return {**item, "bad": "\n".join(bad)}
        raise BadAudio(
            f"none of the {len(self)} utterances can be read; the first: "
            f"{bad[0]}"
        )


def crop_dataset(
    manifest: Manifest,
    rows: np.ndarray,
    crop: float,
    n_crops: int = 1,
    labels: np.ndarray | None = None,
    sample_rate: int = 16000,
    seed: int = 0,
) -> UtteranceDataset:
    """Makes a dataset of random crops, with pseudo-labels if they are given.

    An utterance's crops follow from the seed, the epoch (`set_epoch`) and its
    ID alone. An interrupted epoch therefore resumes with the same crops,
    however many processes read.

    Arguments
    ---------
    manifest : lgl_plugin.dataio.manifest.Manifest
        The corpus.
    rows : numpy.ndarray
        The rows of its utterances to use, int64.
    crop : float
        Length of a crop in seconds.
    n_crops : int
        Disjoint crops per utterance.
    labels : numpy.ndarray, optional
        A label for each of the manifest's rows, int64 (N,); utterances with
        -1 have none and are left out.
    sample_rate : int
        The rate to convert to, in Hz.
    seed : int
        The seed of the crops.

    Returns
    -------
    UtteranceDataset
        With the keys id, sig (n_crops, time) and, given labels, label and
        row.

    Example
    -------
    >>> import soundfile
    >>> path = getfixture("tmp_path") / "tone.wav"
    >>> soundfile.write(path, np.full(16000, 0.5), 16000)
    >>> manifest = Manifest.of([("a", str(path), 0.0, 1.0, "")])
    >>> data = crop_dataset(manifest, np.array([0]), 0.5, labels=np.array([3]))
    >>> data[0]["sig"].shape, data[0]["label"]
    (torch.Size([1, 8000]), 3)
    """

    def read(utterance, wav, offset, duration, place):
        rng = random.Random(f"{seed} {dataset.epoch.item()} {utterance}")
        return read_crops(
            wav, offset, duration, crop, n_crops, sample_rate, rng, place
        )

    if labels is not None:
        rows = rows[labels[rows] >= 0]
    dataset = UtteranceDataset(manifest, rows)
    dataset.add_dynamic_item(
        read, takes=["id", "wav", "offset", "duration", "place"], provides="sig"
    )
    keys = ["id", "sig"]
    if labels is not None:
        dataset.add_dynamic_item(
            lambda row: int(labels[row]), takes="row", provides="label"
        )
        keys.extend(["label", "row"])
    dataset.set_output_keys(keys)
    return dataset
