"""Manifests to datasets: random crops, read without decoding whole files.

An utterance is read as one crop (Stage II), as two disjoint crops (Stage I)
or whole (extraction). Bad audio never reaches the network: in training the
next utterance takes its place, and either way `BadFiles` names it.
"""

import csv
import pathlib
import random

import numpy as np
import soundfile
import torch
import torchaudio
from speechbrain.dataio.dataset import DynamicItemDataset


class BadAudio(Exception):
    """An utterance that cannot be used: missing, corrupt, silent or NaN."""


def read_audio(path, start=0.0, seconds=None, sample_rate=16000):
    """Reads a part of an audio file as mono at the wanted rate.

    Arguments
    ---------
    path : str or pathlib.Path
        A wav, flac, ogg or mp3 file.
    start : float
        Where to begin, in seconds.
    seconds : float, optional
        How much to read; to the end of the file if not given.
    sample_rate : int
        The rate to convert to, in Hz.

    Returns
    -------
    torch.Tensor
        Samples, shape (time,), float32 in [-1, 1].

    Raises
    ------
    BadAudio
        If the file is missing, unreadable or empty, or a sample is not finite.

    Example
    -------
    >>> path = getfixture("tmp_path") / "tone.wav"
    >>> soundfile.write(path, np.full(8000, 0.5), 8000)
    >>> read_audio(path, start=0.5, seconds=0.25).shape
    torch.Size([4000])
    """
    try:
        with soundfile.SoundFile(str(path)) as audio:
            rate = audio.samplerate
            audio.seek(min(round(start * rate), audio.frames))
            frames = -1 if seconds is None else round(seconds * rate)
            samples = audio.read(frames, dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as error:  # soundfile's are RuntimeErrors
        raise BadAudio(f"cannot be read: {error}") from error
    if len(samples) == 0:
        raise BadAudio("holds no samples")
    if not np.isfinite(samples).all():
        raise BadAudio("holds samples that are not finite")
    wav = torch.from_numpy(samples.mean(axis=1))
    if rate != sample_rate:
        wav = torchaudio.functional.resample(wav, rate, sample_rate)
    return wav


def wrap(wav, n_samples):
    """Repeats a waveform until it has `n_samples`, or cuts it there.

    Arguments
    ---------
    wav : torch.Tensor
        Shape (time,), at least one sample.
    n_samples : int
        The wanted length.

    Returns
    -------
    torch.Tensor
        Shape (n_samples,).

    Example
    -------
    >>> wrap(torch.tensor([1.0, 2.0, 3.0]), 5)
    tensor([1., 2., 3., 1., 2.])
    """
    repeats = -(-n_samples // len(wav))
    return wav.repeat(repeats)[:n_samples]


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
    path, offset, duration, crop, n_crops=1, sample_rate=16000, rng=random
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
        What draws the places.

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
    >>> path = getfixture("tmp_path") / "tone.wav"
    >>> soundfile.write(path, np.full(16000, 0.5), 16000)
    >>> read_crops(path, 0.0, 1.0, crop=0.75, n_crops=2).shape
    torch.Size([2, 12000])
    """
    n_samples = round(crop * sample_rate)
    crops = []
    for start, seconds in crop_spans(duration, crop, n_crops, rng):
        wav = read_audio(path, offset + start, seconds, sample_rate)
        if not wav.any():
            # Digital silence in the crop alone: look where there is sound.
            wav = _loudest(
                read_audio(path, offset, duration, sample_rate), n_samples
            )
        crops.append(wrap(wav, n_samples))
    return torch.stack(crops)


def _loudest(wav, n_samples):
    """The crop around the loudest sample of a waveform."""
    peak = int(wav.abs().argmax())
    if wav[peak] == 0:
        raise BadAudio("is silent from end to end")
    start = max(0, min(peak - n_samples // 2, len(wav) - n_samples))
    return wav[start : start + n_samples]


class UtteranceDataset(DynamicItemDataset):
    """A DynamicItemDataset in which bad audio does not end the epoch.

    An utterance whose reading raises `BadAudio` is replaced by the one that
    follows, so that batches keep their size; what was bad travels with the
    item under the key `bad`, lines of `ID<TAB>reason` (text, because
    SpeechBrain's batches would transpose a list).

    Example
    -------
    >>> def read(wav):
    ...     if wav == "broken":
    ...         raise BadAudio("cannot be read")
    ...     return wav
    >>> read.takes, read.provides = ["wav"], ["sig"]
    >>> data = UtteranceDataset({"a": {"wav": "broken"}, "b": {"wav": "ok"}})
    >>> data.add_dynamic_item(read, takes="wav", provides="sig")
    >>> data.set_output_keys(["id", "sig"])
    >>> data[0]
    {'id': 'b', 'sig': 'ok', 'bad': 'a\\tcannot be read'}
    """

    def __getitem__(self, index):
        bad = []
        for step in range(len(self)):
            utterance = self.data_ids[(index + step) % len(self)]
            try:
                item = self.pipeline.compute_outputs(
                    {"id": utterance, **self.data[utterance]}
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


class BadFiles:
    """Counts and names bad utterances, up to a limit.

    Arguments
    ---------
    path : str or pathlib.Path
        The log, lines of `utterance<TAB>reason`; what it already holds counts.
    limit : int
        How many are tolerated.

    Raises
    ------
    ValueError
        From `add`, when there are more than `limit`; shows the first ten.

    Example
    -------
    >>> path = getfixture("tmp_path") / "bad_files.txt"
    >>> bad = BadFiles(path, limit=1)
    >>> bad.add([("a.wav", "cannot be read"), ("a.wav", "cannot be read")])
    >>> path.read_text()
    'a.wav\\tcannot be read\\n'
    """

    def __init__(self, path, limit):
        self.path = pathlib.Path(path)
        self.limit = limit
        self.reasons = {}
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                utterance, _, reason = line.partition("\t")
                self.reasons[utterance] = reason

    def add(self, found):
        """Adds (utterance, reason) pairs; one already known is not counted."""
        found = dict(found)
        news = [name for name in found if name not in self.reasons]
        if news:
            with open(self.path, "a", encoding="utf-8") as log:
                for name in news:
                    self.reasons[name] = " ".join(found[name].split())
                    log.write(f"{name}\t{self.reasons[name]}\n")
        # Known ones too: starting again must not lift the limit.
        if found and len(self.reasons) > self.limit:
            first = list(self.reasons.items())[:10]
            listing = "\n".join(f"  {u}: {r}" for u, r in first)
            raise ValueError(
                f"{len(self.reasons)} bad utterances, more than the "
                f"{self.limit} that max_bad_share allows. All are named in "
                f"{self.path}; the first:\n{listing}\n"
                f"Repair them and delete {self.path.name}, or remove them, or "
                "raise max_bad_share."
            )


def load_manifest(manifest, data_root):
    """Reads a manifest as SpeechBrain does, with durations as numbers.

    Arguments
    ---------
    manifest : str or pathlib.Path
        A csv with the columns ID, duration, wav, start, stop, spk_id.
    data_root : str
        What stands for `$data_root` in it.

    Returns
    -------
    dict
        From utterance ID to {"wav": path, "offset": seconds into the file,
        "duration": seconds, "spk_id": str}.

    Example
    -------
    >>> path = getfixture("tmp_path") / "manifest.csv"
    >>> _ = path.write_text(
    ...     "ID,duration,wav,start,stop,spk_id\\n"
    ...     "a.wav,2.5,$data_root/a.wav,0,40000,\\n"
    ... )
    >>> load_manifest(path, "corpus")
    {'a.wav': {'wav': 'corpus/a.wav', 'offset': 0.0, 'duration': 2.5, \
'spk_id': ''}}
    """
    utterances = {}
    with open(manifest, newline="", encoding="utf-8") as source:
        for row in csv.DictReader(source, skipinitialspace=True):
            duration = float(row["duration"])
            start, stop = int(row["start"]), int(row["stop"])
            utterances[row["ID"]] = {
                "wav": row["wav"].replace("$data_root", str(data_root), 1),
                # Start and stop count samples at the file's own rate.
                "offset": duration * start / (stop - start),
                "duration": duration,
                "spk_id": row["spk_id"],
            }
    return utterances


def held_out(utterances, share, seed):
    """Sets aside utterances on which no gradient is taken.

    Arguments
    ---------
    utterances : iterable of str
        Utterance IDs.
    share : float
        Which part to set aside, between 0 and 1; at least 2 utterances and
        at most 2,000, since pseudo-trials are all their pairs.
    seed : int
        Seed of the draw.

    Returns
    -------
    (list of str, list of str)
        Those to train on and those set aside, both in the order given.

    Example
    -------
    >>> train, valid = held_out("abcdefghij", 0.2, seed=1)
    >>> len(train), len(valid)
    (8, 2)
    """
    utterances = list(utterances)
    n_valid = min(max(2, round(share * len(utterances))), 2000)
    chosen = set(random.Random(seed).sample(utterances, n_valid))
    train = [u for u in utterances if u not in chosen]
    return train, [u for u in utterances if u in chosen]


def crop_dataset(
    utterances, crop, n_crops=1, labels=None, sample_rate=16000, fixed=False
):
    """A dataset of random crops, with pseudo-labels if they are given.

    Arguments
    ---------
    utterances : dict
        From ID to wav, offset and duration, see `load_manifest`.
    crop : float
        Length of a crop in seconds.
    n_crops : int
        Disjoint crops per utterance.
    labels : dict, optional
        From ID to int; utterances without a label are left out.
    sample_rate : int
        The rate to convert to, in Hz.
    fixed : bool
        Whether an utterance gives the same crops every time, as a held-out
        set must.

    Returns
    -------
    UtteranceDataset
        With the keys id, sig (n_crops, time) and, given labels, label and
        row (the utterance's place among the labels).

    Example
    -------
    >>> path = getfixture("tmp_path") / "tone.wav"
    >>> soundfile.write(path, np.full(16000, 0.5), 16000)
    >>> a = {"wav": str(path), "offset": 0.0, "duration": 1.0}
    >>> data = crop_dataset({"a": a}, 0.5, labels={"a": 3})
    >>> data[0]["sig"].shape, data[0]["label"]
    (torch.Size([1, 8000]), 3)
    """

    def read(utterance, wav, offset, duration):
        rng = random.Random(utterance) if fixed else random
        return read_crops(
            wav, offset, duration, crop, n_crops, sample_rate, rng
        )

    if labels is not None:
        utterances = {u: utterances[u] for u in utterances if u in labels}
    dataset = UtteranceDataset(utterances)
    dataset.add_dynamic_item(
        read, takes=["id", "wav", "offset", "duration"], provides="sig"
    )
    keys = ["id", "sig"]
    if labels is not None:
        rows = {name: row for row, name in enumerate(labels)}
        dataset.add_dynamic_item(labels.get, takes="id", provides="label")
        dataset.add_dynamic_item(rows.get, takes="id", provides="row")
        keys.extend(["label", "row"])
    dataset.set_output_keys(keys)
    return dataset
