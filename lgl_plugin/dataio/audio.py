"""Reads spans and random crops of audio files and of shards' members."""

from __future__ import annotations

import contextlib
import io
import math
import os
import random
from collections.abc import Sequence

import numpy as np
import soundfile
import torch
import torchaudio

# The largest sample taken for audio. Full scale is 1, but some programs write
# the integers of 32 bits as floats, and those files are usable.
MAX_SAMPLE = 2.0**31
# Taps of the resampling filter, which grows with both rates over their
# greatest common divisor. The limit is 20 MB, ten times the need of any usual
# rate; a header that claims 15,999 Hz would fill a worker's memory.
MAX_TAPS = 5_000_000
# Seconds decoded at once in the search for sound: a file of ten silent hours
# would otherwise fill a worker's memory.
SEARCH_SECONDS = 60.0


class BadAudio(ValueError):
    """An utterance that cannot be used: missing, corrupt, silent or NaN.

    Example
    -------
    >>> try:
    ...     audio_seconds("missing.wav")
    ... except BadAudio as reason:
    ...     print(reason)
    cannot be opened: No such file or directory
    """


def audio_seconds(path: str | os.PathLike) -> float:
    """Returns the duration of an audio file, read from its header.

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


def why_unreadable(path: str | os.PathLike, error: Exception | None) -> str:
    """Returns the reason why a file could not be opened or read.

    The file system is asked first, since libsndfile answers each of its
    refusals with "System error".
    """
    if os.path.exists(path) and not os.path.isfile(path):
        # Opening a named pipe would block the worker until somebody writes.
        return "is not a regular file"
    try:
        with open(path, "rb") as audio:
            empty = not audio.read(1)
    except OSError as refusal:
        return f"cannot be opened: {refusal.strerror}"
    reason = getattr(error, "error_string", error)
    return "is empty" if empty else f"cannot be read: {reason}"


def rate_problem(rate: int, sample_rate: int) -> str | None:
    """Returns why `rate` cannot be converted to `sample_rate` (Hz), or None."""
    common = math.gcd(rate, sample_rate)
    if (rate // common) * (sample_rate // common) > MAX_TAPS:
        return f"has {rate} Hz, too odd to convert to {sample_rate} Hz"
    return None


def read_audio(
    path: str | os.PathLike,
    start: float = 0.0,
    seconds: float | None = None,
    sample_rate: int = 16000,
    place: Sequence[int] | None = None,
) -> torch.Tensor:
    """Reads one span of an audio file as mono at the wanted rate.

    Arguments
    ---------
    path : str or pathlib.Path
        A wav, flac, ogg or mp3 file; or a shard, which holds many of them.
    start : float
        Where the span begins, in seconds.
    seconds : float, optional
        Length of the span; to the end of the file if not given.
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


def read_spans(
    path: str | os.PathLike,
    spans: Sequence[tuple[float, float | None]],
    sample_rate: int = 16000,
    place: Sequence[int] | None = None,
) -> list[torch.Tensor]:
    """Reads several spans of an audio file, which is opened once.

    Arguments
    ---------
    path, sample_rate, place
        See `read_audio`.
    spans : list of (float, float or None)
        Start and length of each span in seconds; None: to the end.

    Returns
    -------
    list of torch.Tensor
        Samples, each of shape (time,), float32 in [-1, 1].

    Raises
    ------
    BadAudio
        See `read_audio`; an empty span is enough.

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
    """Opens an audio file; errors of opening and of the block are BadAudio."""
    if not os.path.isfile(path):
        raise BadAudio(why_unreadable(path, None))
    try:
        if place is None:
            content = contextlib.nullcontext(str(path))
        else:
            content = Member(path, *place)
        with content as source, soundfile.SoundFile(source) as audio:
            yield audio
    except (OSError, RuntimeError) as error:  # soundfile's are RuntimeErrors
        raise BadAudio(why_unreadable(path, error)) from error
    except MemoryError as error:
        raise BadAudio("is said to be larger than the memory") from error
    except TypeError as error:
        # soundfile wants the format of a file called .raw as an argument.
        raise BadAudio("has no header") from error


def _read_span(audio, start, seconds, sample_rate):
    """Reads one span of an open file, as `read_audio` returns it."""
    rate = audio.samplerate
    if problem := rate_problem(rate, sample_rate):
        raise BadAudio(problem)
    audio.seek(min(round(start * rate), audio.frames))
    frames = -1 if seconds is None else round(seconds * rate)
    # libsndfile takes three times as long as numpy to convert 16-bit samples
    # to floats. They are finite, so the check below is for other formats.
    is_16_bit = audio.subtype == "PCM_16"
    try:
        samples = audio.read(frames, "int16" if is_16_bit else "float32")
    except ValueError as error:
        # soundfile allocates the header's length less the position, which is
        # negative when a seek lands beyond what the header claims.
        raise BadAudio("cannot be read: header and content differ") from error
    if len(samples) == 0:
        raise BadAudio("holds no samples")
    if is_16_bit:
        samples = samples.astype(np.float32)
        samples *= 1 / 32768
    # "not <=" instead of ">": a NaN fails every comparison.
    elif not (peak := np.abs(samples).max()) <= MAX_SAMPLE:
        finite = np.isfinite(peak)
        extent = f"up to {peak:.1g}" if finite else "that are not finite"
        raise BadAudio(f"holds samples {extent}")
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    wav = torch.from_numpy(samples)
    if rate != sample_rate:
        wav = torchaudio.functional.resample(wav, rate, sample_rate)
    return wav


def crop_spans(
    duration: float, crop: float, n_crops: int, rng: random.Random
) -> list[tuple[float, float]]:
    """Draws start and length of disjoint crops, all in seconds.

    With room for all crops, their positions are uniformly random; a shorter
    utterance is cut into equal parts, which `read_crops` repeats to full
    length. The order is random too, so that neither view of Stage I is always
    the earlier one (paper, section 2.1).
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
    rng: random.Random = random,  # type: ignore[assignment]
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
            wav = _first_sound(path, offset, duration, sample_rate, place)
            crops[index] = _loudest_crop(wav, n_samples)
    return torch.stack([wrap(wav, n_samples) for wav in crops])


def _first_sound(path, start, seconds, sample_rate, place):
    """Returns the first `SEARCH_SECONDS` of a span that are not all zeros."""
    with _open(path, place) as audio:
        end = min(start + seconds, audio.frames / audio.samplerate)
        while start < end:
            piece = min(SEARCH_SECONDS, end - start)
            wav = _read_span(audio, start, piece, sample_rate)
            if wav.any():
                return wav
            start += SEARCH_SECONDS
    raise BadAudio("is silent from end to end")


def _loudest_crop(wav, n_samples):
    """Cuts `n_samples` around the sample of the largest magnitude."""
    peak = int(wav.abs().argmax())
    start = max(0, min(peak - n_samples // 2, len(wav) - n_samples))
    return wav[start : start + n_samples]


def wrap(wav: torch.Tensor, n_samples: int) -> torch.Tensor:
    """Repeats a waveform (time,) end to end, and cuts it at `n_samples`."""
    if len(wav) < n_samples:
        wav = wav.repeat(-(-n_samples // len(wav)))
    return wav[:n_samples]


class Member(io.FileIO):
    """A range of a file's bytes, read as if it were a file of its own.

    soundfile thus decodes an audio file in place within a shard.
    """

    def __init__(
        self, path: str | os.PathLike, first_byte: int, n_bytes: int
    ) -> None:
        super().__init__(path)
        self._first = first_byte
        self._length = n_bytes
        super().seek(first_byte)

    def tell(self) -> int:
        """Returns the position in bytes from the start of the range."""
        return super().tell() - self._first

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to a position within the range; reading beyond it gives b""."""
        position = (0, self.tell(), self._length)[whence] + offset
        if position < 0:
            raise ValueError(f"position {position} is before the start")
        super().seek(self._first + position)
        return position

    def readinto(self, buffer) -> int:
        """Fills a buffer up to the end of the range; returns the byte count."""
        left = max(self._length - self.tell(), 0)
        return super().readinto(memoryview(buffer).cast("B")[:left])

    # FileIO's own read past the range's end; RawIOBase's call `readinto`.
    read = io.RawIOBase.read  # type: ignore[assignment]
    readall = io.RawIOBase.readall
