"""Manifests to datasets: random crops, read without decoding whole files.

An utterance is read as one crop (Stage II), as two disjoint crops (Stage I)
or whole (extraction). Bad audio never reaches the network: in training the
next utterance takes its place, and either way `BadFiles` names it.
"""

import contextlib
import math
import os
import pathlib
import random

import numpy as np
import soundfile
import torch
import torchaudio
from speechbrain.dataio.dataset import DynamicItemDataset

from lgl_plugin.manifest import one_line
from lgl_plugin.shards import Member

# Samples this far above full scale, 1, are no audio. Floats that hold the
# integers of 32 bits, which some programs write, pass.
LOUDEST = 2.0**31
# Of a resampling filter, whose size grows with both rates over their greatest
# common divisor: 20 MB, ten times what any usual rate needs.
MAX_TAPS = 5_000_000
# What is searched at once for sound.
STRETCH_SECONDS = 60.0


class BadAudio(Exception):
    """An utterance that cannot be used: missing, corrupt, silent or NaN.

    Example
    -------
    >>> try:
    ...     audio_seconds("missing.wav")
    ... except BadAudio as reason:
    ...     print(reason)
    cannot be opened: No such file or directory
    """


def audio_seconds(path):
    """How long an audio file is, by its header.

    Arguments
    ---------
    path : str or pathlib.Path
        A wav, flac, ogg or mp3 file.

    Returns
    -------
    float
        Seconds, above 0.

    Raises
    ------
    BadAudio
        If the file is missing, unreadable or empty.

    Example
    -------
    >>> path = getfixture("tmp_path") / "tone.wav"
    >>> soundfile.write(path, np.full(8000, 0.5), 16000)
    >>> audio_seconds(path)
    0.5
    """
    with _open(path, None) as audio:
        if not audio.frames:
            raise BadAudio("holds no samples")
        return audio.frames / audio.samplerate


def why_unreadable(path, error):
    """The reason for an error of libsndfile's, in a user's words.

    libsndfile calls all that the system refuses "System error".

    Arguments
    ---------
    path : str or pathlib.Path
        What could not be opened or read.
    error : Exception
        What was raised.

    Returns
    -------
    str

    Example
    -------
    >>> why_unreadable("nowhere.wav", RuntimeError("System error."))
    'cannot be opened: No such file or directory'
    """
    if os.path.exists(path) and not os.path.isfile(path):
        return "is not a regular file"  # and opening it might wait for ever
    try:
        with open(path, "rb") as audio:
            empty = not audio.read(1)
    except OSError as refusal:
        return f"cannot be opened: {refusal.strerror}"
    reason = getattr(error, "error_string", error)
    return "is empty" if empty else f"cannot be read: {reason}"


def rate_problem(rate, sample_rate):
    """Why a sampling rate cannot be converted, or None.

    Arguments
    ---------
    rate : int
        Of the file, in Hz.
    sample_rate : int
        The wanted one, in Hz.

    Returns
    -------
    str or None

    Example
    -------
    >>> rate_problem(44100, 16000)
    >>> rate_problem(16001, 16000)
    'has 16001 Hz, too odd to convert to 16000 Hz'
    """
    common = math.gcd(rate, sample_rate)
    if (rate // common) * (sample_rate // common) > MAX_TAPS:
        return f"has {rate} Hz, too odd to convert to {sample_rate} Hz"
    return None


def read_audio(path, start=0.0, seconds=None, sample_rate=16000, place=None):
    """Reads a part of an audio file as mono at the wanted rate.

    Arguments
    ---------
    path : str or pathlib.Path
        A wav, flac, ogg or mp3 file; or a shard, which holds many of them.
    start : float
        Where to begin, in seconds.
    seconds : float, optional
        How much to read; to the end of the file if not given.
    sample_rate : int
        The rate to convert to, in Hz.
    place : (int, int), optional
        First byte and number of bytes of the audio file within a shard.

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
    return read_spans(path, [(start, seconds)], sample_rate, place)[0]


def read_spans(path, spans, sample_rate=16000, place=None):
    """Reads parts of an audio file, which is opened once.

    Arguments
    ---------
    path : str or pathlib.Path
        See `read_audio`.
    spans : list of (float, float or None)
        Start and length of each part in seconds; None: to the end.
    sample_rate : int
        The rate to convert to, in Hz.
    place : (int, int), optional
        See `read_audio`.

    Returns
    -------
    list of torch.Tensor
        Samples, each of shape (time,), float32 in [-1, 1].

    Raises
    ------
    BadAudio
        If the file is missing, unreadable or a part of it empty, or a sample
        is not finite.

    Example
    -------
    >>> path = getfixture("tmp_path") / "tone.wav"
    >>> soundfile.write(path, np.full(16000, 0.5), 16000)
    >>> [len(wav) for wav in read_spans(path, [(0.5, 0.25), (0.75, None)])]
    [4000, 4000]
    """
    with _open(path, place) as audio:
        return [_read_span(audio, *span, sample_rate) for span in spans]


@contextlib.contextmanager
def _open(path, place):
    """An audio file, opened; its errors, then too, are BadAudio."""
    if not os.path.isfile(path):
        raise BadAudio(why_unreadable(path, None))
    try:
        with contextlib.ExitStack() as stack:
            source = str(path)
            if place is not None:
                source = stack.enter_context(Member(path, *place))
            yield stack.enter_context(soundfile.SoundFile(source))
    except (OSError, RuntimeError) as error:  # soundfile's are RuntimeErrors
        raise BadAudio(why_unreadable(path, error)) from error
    except MemoryError as error:
        raise BadAudio("is said to be larger than the memory") from error
    except TypeError as error:
        # Of a file called .raw soundfile asks what is in it.
        raise BadAudio("has no header") from error


def _read_span(audio, start, seconds, sample_rate):
    """A part of an open file, as `read_audio` gives it."""
    rate = audio.samplerate
    if problem := rate_problem(rate, sample_rate):
        raise BadAudio(problem)
    audio.seek(min(round(start * rate), audio.frames))
    frames = -1 if seconds is None else round(seconds * rate)
    # libsndfile takes three times as long to make floats of 16 bits.
    short = audio.subtype == "PCM_16"
    try:
        samples = audio.read(frames, "int16" if short else "float32")
    except ValueError as error:  # a negative number of samples is left
        raise BadAudio("cannot be read: header and content differ") from error
    if len(samples) == 0:
        raise BadAudio("holds no samples")
    if short:
        samples = samples.astype(np.float32)
        samples *= 1 / 32768
    elif not (peak := np.abs(samples).max()) <= LOUDEST:
        finite = np.isfinite(peak)
        what = f"up to {peak:.1g}" if finite else "that are not finite"
        raise BadAudio(f"holds samples {what}")
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    wav = torch.from_numpy(samples)
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
    if len(wav) < n_samples:
        wav = wav.repeat(-(-n_samples // len(wav)))
    return wav[:n_samples]


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
    with _open(path, place) as audio:
        end = min(end, audio.frames / audio.samplerate)
        while offset < end:
            seconds = min(STRETCH_SECONDS, end - offset)
            wav = _read_span(audio, offset, seconds, sample_rate)
            if wav.any():
                return wav
            offset += STRETCH_SECONDS
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
    manifest : lgl_plugin.manifest.Manifest
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
    >>> from lgl_plugin.manifest import Manifest
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
        From `add` and `check`, when there are more than `limit`; shows the
        first ten.

    Example
    -------
    >>> path = getfixture("tmp_path") / "bad_files.txt"
    >>> bad = BadFiles(path, limit=1)
    >>> bad.add([("a.wav", "cannot be read"), ("a.wav", "cannot be read")])
    >>> path.read_text()
    'a.wav\\tcannot be read\\n'
    """

    def __init__(self, path, limit=0):
        self.path = pathlib.Path(path)
        self.limit = limit
        self.reasons = {}
        self._read()

    def _read(self):
        if self.path.exists():
            # What is torn or edited by hand is no reason to stop.
            text = self.path.read_text(encoding="utf-8", errors="replace")
            for line in text.splitlines():
                utterance, _, reason = line.partition("\t")
                self.reasons[utterance] = reason

    def add(self, found):
        """Adds (utterance, reason) pairs; one already known is not counted."""
        found = {one_line(name): reason for name, reason in found}
        if not found.keys() <= self.reasons.keys():
            self._read()  # what other processes have found
        news = [name for name in found if name not in self.reasons]
        if news:
            with open(self.path, "a+b") as log:
                if log.tell():
                    log.seek(-1, os.SEEK_END)
                    if log.read() != b"\n":  # torn by a crash
                        log.write(b"\n")
                for name in news:
                    self.reasons[name] = one_line(" ".join(found[name].split()))
                    log.write(f"{name}\t{self.reasons[name]}\n".encode())
        if found:
            self.check()

    def check(self):
        """Raises if there are too many, those of an earlier start counted."""
        if len(self.reasons) > self.limit:
            first = list(self.reasons.items())[:10]
            listing = "\n".join(f"  {u}: {r}" for u, r in first)
            raise ValueError(
                f"{len(self.reasons)} bad utterances, more than the "
                f"{self.limit} that max_bad_share allows. All are named in "
                f"{self.path}; the first:\n{listing}\n"
                f"Repair them and delete {self.path.name}, or raise "
                "max_bad_share."
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
    manifest : lgl_plugin.manifest.Manifest
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
    >>> from lgl_plugin.manifest import Manifest
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
