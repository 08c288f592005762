"""Manifests to datasets: random crops, read without decoding whole files.

An utterance is read as one crop (Stage II), as two disjoint crops (Stage I)
or whole (extraction). Bad audio never reaches the network: in training the
next utterance takes its place, and either way `BadFiles` names it.
"""

import random

import torch
from speechbrain.dataio.dataset import DynamicItemDataset

from lgl_plugin.dataio import audio
from lgl_plugin.dataio.audio import (
    BadAudio,
    _open,
    _read_span,
    read_spans,
    wrap,
)


def crop_spans(duration, crop, n_crops, rng):
    """Draws where to read disjoint crops.

    An utterance with room for all crops gives uniformly random disjoint
    spans; a shorter one is cut into equal parts, which the reader wraps. The
    spans come in random order, since neither view of Stage I may always be
    the earlier one (paper, section 2.1).

    Arguments
    ---------
    duration : float
        Length of the utterance in seconds.
    crop : float
        Length of a crop in seconds.
    n_crops : int
        How many.
    rng : random.Random or module
        What draws.

    Returns
    -------
    list of (float, float)
        Start and length of each span, in seconds.

    Example
    -------
    >>> crop_spans(1.0, 1.0, 2, random.Random(1))
    [(0.5, 0.5), (0.0, 0.5)]
    """
    length = min(crop, duration / n_crops)
    slack = max(duration - n_crops * length, 0.0)
    # Sorted cuts of the slack are the gaps between crops laid end to end.
    cuts = sorted(rng.uniform(0.0, slack) for _ in range(n_crops))
    spans = [(cut + i * length, length) for i, cut in enumerate(cuts)]
    rng.shuffle(spans)
    return spans


def read_crops(
    path,
    offset,
    duration,
    crop,
    n_crops=1,
    sample_rate=16000,
    rng=random,
    place=None,
):
    """Reads random disjoint crops of one utterance.

    Arguments
    ---------
    path : str or pathlib.Path
        The audio file.
    offset : float
        Where the utterance begins in it, in seconds.
    duration : float
        Length of the utterance in seconds.
    crop : float
        Length of a crop in seconds.
    n_crops : int
        How many crops.
    sample_rate : int
        The rate to convert to, in Hz.
    rng : random.Random or module
        What draws where to read.
    place : (int, int), optional
        Where in a shard the file lies, see `read_audio`.

    Returns
    -------
    torch.Tensor
        Shape (n_crops, crop * sample_rate), float32.

    Raises
    ------
    BadAudio
        If the file cannot be read or is silent from end to end.

    Example
    -------
    >>> import numpy as np, soundfile
    >>> path = getfixture("tmp_path") / "tone.wav"
    >>> soundfile.write(path, np.full(16000, 0.5), 16000)
    >>> read_crops(path, 0.0, 1.0, crop=0.75, n_crops=2).shape
    torch.Size([2, 12000])
    """
    n_samples = round(crop * sample_rate)
    spans = crop_spans(duration, crop, n_crops, rng)
    spans = [(offset + start, seconds) for start, seconds in spans]
    crops = read_spans(path, spans, sample_rate, place)
    for index, wav in enumerate(crops):
        if not wav.any():
            # Digital silence in the crop alone: look where there is sound.
            wav = _sounding(path, offset, duration, sample_rate, place)
            crops[index] = _loudest(wav, n_samples)
    return torch.stack([wrap(wav, n_samples) for wav in crops])


def _sounding(path, offset, duration, sample_rate, place):
    """The first stretch of an utterance that is not silent."""
    end = offset + duration
    with _open(path, place) as opened:
        end = min(end, opened.frames / opened.samplerate)
        while offset < end:
            seconds = min(audio.STRETCH_SECONDS, end - offset)
            wav = _read_span(opened, offset, seconds, sample_rate)
            if wav.any():
                return wav
            offset += audio.STRETCH_SECONDS
    raise BadAudio("is silent from end to end")


def _loudest(wav, n_samples):
    """The crop around the loudest sample of a waveform."""
    peak = int(wav.abs().argmax())
    start = max(0, min(peak - n_samples // 2, len(wav) - n_samples))
    return wav[start : start + n_samples]


class UtteranceDataset(DynamicItemDataset):
    """A DynamicItemDataset over a manifest, which bad audio does not end.

    An utterance whose reading raises `BadAudio` is replaced by the one that
    follows, so that batches keep their size; what was bad travels with the
    item under the key `bad`, lines of `ID<TAB>reason` (text, because
    SpeechBrain's batches would transpose a list). The other keys are id, row
    (in the manifest) and those of `Manifest`.

    Arguments
    ---------
    manifest : lgl_plugin.dataio.manifest.Manifest
        The corpus; processes that are forked share it.
    rows : numpy.ndarray
        Which of its utterances, int64; at least one.

    Attributes
    ----------
    epoch : torch.Tensor
        The epoch that items are drawn for, int64 (), in memory that loading
        processes share.

    Example
    -------
    >>> import numpy as np
    >>> from lgl_plugin.dataio.manifest import Manifest
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

    def __init__(self, manifest, rows):
        first = int(rows[0])
        # Of the mapping that it takes SpeechBrain makes lists of objects.
        super().__init__({first: {"row": first, **manifest[first]}})
        self.data, self.data_ids = manifest, rows
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch):
        """What to call before each epoch, lest it draws what the last drew."""
        self.epoch.fill_(epoch)

    def __getitem__(self, index):
        if index >= len(self):
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
    manifest,
    rows,
    crop,
    n_crops=1,
    labels=None,
    sample_rate=16000,
    seed=0,
):
    """A dataset of random crops, with pseudo-labels if they are given.

    An utterance's crops follow from the seed, the epoch (`set_epoch`) and its
    ID alone: an interrupted epoch goes on as it would have, whichever
    processes read.

    Arguments
    ---------
    manifest : lgl_plugin.dataio.manifest.Manifest
        The corpus.
    rows : numpy.ndarray
        Which of its utterances, int64.
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
        Of the crops.

    Returns
    -------
    UtteranceDataset
        With the keys id, sig (n_crops, time) and, given labels, label and
        row.

    Example
    -------
    >>> from lgl_plugin.dataio.manifest import Manifest
    >>> import numpy as np, soundfile
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
