"""Reads audio files and shards' members: spans of them, and why one is bad."""

import contextlib
import io
import math
import os

import numpy as np
import soundfile
import torch
import torchaudio

# Samples this far above full scale, 1, are no audio. Floats that hold the
# integers of 32 bits, which some programs write, pass.
LOUDEST = 2.0**31
# Of a resampling filter, whose size grows with both rates over their greatest
# common divisor: 20 MB, ten times what any usual rate needs.
MAX_TAPS = 5_000_000
# What is searched at once for sound.
STRETCH_SECONDS = 60.0


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


class Member(io.RawIOBase):
    """A part of a file, to be read as if it were a file of its own.

    Arguments
    ---------
    path : str or pathlib.Path
        The file, such as a shard.
    first_byte : int
        Where the part begins.
    n_bytes : int
        How long it is.

    Raises
    ------
    OSError
        When the file cannot be opened or read.

    Example
    -------
    >>> path = getfixture("tmp_path") / "shard.tar"
    >>> _ = path.write_bytes(b"one,two,three")
    >>> with Member(path, 4, 3) as member:
    ...     member.read()
    b'two'
    """

    def __init__(self, path, first_byte, n_bytes):
        self._first = first_byte
        self._length = n_bytes
        self._position = 0
        self._handle = None  # which close() asks for if opening fails
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def readable(self):
        """True."""
        return True

    def seekable(self):
        """True."""
        return True

    def tell(self):
        """The position, in bytes from the beginning of the part."""
        return self._position

    def seek(self, offset, whence=os.SEEK_SET):
        """Moves to a position; one beyond the end reads nothing."""
        position = (0, self._position, self._length)[whence] + offset
        if position < 0:
            raise ValueError(f"position {position} is before the start")
        self._position = position
        return position

    def readinto(self, buffer):
        """Fills a buffer as far as the part goes; returns how many bytes."""
        if self.closed:
            raise ValueError("the file is closed")
        buffer = memoryview(buffer).cast("B")
        left = max(self._length - self._position, 0)
        # preadv: the position is this object's, not that of the handle.
        n_read = os.preadv(
            self._handle, [buffer[:left]], self._first + self._position
        )
        self._position += n_read
        return n_read

    def close(self):
        """Closes the file."""
        if not self.closed and self._handle is not None:
            os.close(self._handle)
        super().close()
