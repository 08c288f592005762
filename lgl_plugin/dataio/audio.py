"""Reads spans of audio files and of shards' members."""

import contextlib
import io
import math
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import soundfile
import torch
import torchaudio

from lgl_plugin.dataio.manifest import RATES
from lgl_plugin.dataio.storage import check_storage, patient

# The largest magnitude of a sample. Full scale is 1, but some programs write
# 32-bit integers as floats, and those files are usable.
MAX_SAMPLE = 2.0**31
# The peak up to which a waveform counts as silent: 80 dB below full scale,
# three quantisation steps of 16 bits. It is not 0, because the mean of two
# channels in opposite phase is not exactly 0: rounding leaves half a step.
SILENCE = 1e-4
# The largest resampling filter, in taps: 20 MB, ten times the need of any usual
# rate. The filter grows with both rates divided by their greatest common
# divisor: a header that claims 15,999 Hz would fill a worker's memory.
MAX_TAPS = 5_000_000
# The most samples, of all channels together, that are decoded at once. An ogg
# of 13 kB can hold 5 s of 64 channels at 192 kHz, which would take 246 MB.
BLOCK = 2**20
# Seconds decoded at once in the search for sound: a file of ten silent hours
# would otherwise fill a worker's memory.
SEARCH_SECONDS = 60.0
# The beginning of libmpg123's lines on stderr about a damaged mp3.
MPG123_NOTES = re.compile(
    rb"\s*$|(Note|Warning): |.*(libmpg123|\[\w+\.c:\d+\]).*(error|warning):"
)


class BadAudio(ValueError):
    """An utterance that cannot be used: missing, corrupt, silent or NaN.

    Example
    -------
    >>> try:
    ...     read_audio("missing.wav")
    ... except BadAudio as reason:
    ...     print(reason)
    cannot be opened: No such file or directory
    """


class Header(NamedTuple):
    """The size of an audio file: samples of a channel, Hz, channels."""

    frames: int
    rate: int
    channels: int

    @property
    def seconds(self) -> float:
        """The duration."""
        return self.frames / self.rate


@patient
def probe(
    path: str | os.PathLike,
    sample_rate: int = 16000,
    channel: int | None = None,
) -> Header:
    """Checks that training can read a file, and returns the file's size.

    Opens the file, seeks to the middle and decodes a twentieth of a second.
    Raises BadAudio if that fails, and StorageFailure as `read_audio` does.
    """
    with open_audio(path) as audio:
        header = Header(audio.frames, audio.samplerate, audio.channels)
        if header.frames == 0:
            raise BadAudio("holds no samples")
        if header.frames >= 2**62:  # FLAC from a stream
            raise BadAudio("header does not give the length: encode it again")
        check_rate(header.rate, sample_rate)
        _read_mono(audio, header.seconds / 2, 0.05, channel)
    return header


def channel_of(header: Header, channel: int | None) -> int | None:
    """Returns the channel to read; None for a file with a single channel.

    Raises BadAudio if the file has several channels, but not this one.
    """
    if header.channels == 1:
        return None
    _check_channel(header.channels, channel)
    return channel


def _check_channel(channels, channel):
    """Raises BadAudio if a file with `channels` channels lacks `channel`."""
    if channel is not None and channel >= channels:
        raise BadAudio(
            f"has {channels} channels, numbered from 0, and no channel "
            f"{channel}"
        )


def whole_file(
    name: str,
    path: str | os.PathLike,
    channel: int | None,
    rates: Sequence[int],
) -> tuple:
    """Returns a row, see `Manifest.of`, that spans a whole file.

    Raises BadAudio if the file cannot be read, cannot be converted to each of
    the sample rates, or lacks the channel.
    """
    header = probe(path, rates[0])
    for rate in rates[1:]:
        check_rate(header.rate, rate)
    read = channel_of(header, channel)
    return name, str(path), 0.0, header.seconds, "", read, None


def check_rate(rate: int, sample_rate: int) -> None:
    """Raises BadAudio if `rate` cannot be converted to `sample_rate` (Hz)."""
    if not RATES[0] <= rate <= RATES[1]:
        raise BadAudio(
            f"has {rate} Hz by its header, which is outside {RATES[0]:,} to "
            f"{RATES[1]:,} Hz"
        )
    common = math.gcd(rate, sample_rate)
    if (rate // common) * (sample_rate // common) > MAX_TAPS:
        raise BadAudio(f"has {rate} Hz, too odd to convert to {sample_rate} Hz")


def read_audio(
    path: str | os.PathLike,
    start: float = 0.0,
    seconds: float | None = None,
    sample_rate: int = 16000,
    place: Sequence[int] | None = None,
    channel: int | None = None,
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
    channel : int, optional
        The channel to read, from 0; the mean of all if not given.

    Returns
    -------
    torch.Tensor
        Samples, shape (time,), float32 in [-1, 1].

    Raises
    ------
    BadAudio
        If the file is missing, unreadable or empty, lacks the channel, or a
        sample is not finite.
    StorageFailure
        If the storage still fails after half a minute.

    Example
    -------
    >>> path = getfixture("tmp_path") / "tone.wav"
    >>> soundfile.write(path, np.full(8000, 0.5), 8000)
    >>> read_audio(path, start=0.5, seconds=0.25).shape
    torch.Size([4000])
    """
    return read_spans(path, [(start, seconds)], sample_rate, place, channel)[0]


@patient
def read_spans(
    path: str | os.PathLike,
    spans: Sequence[tuple[float, float | None]],
    sample_rate: int = 16000,
    place: Sequence[int] | None = None,
    channel: int | None = None,
) -> list[torch.Tensor]:
    """Reads spans (start, seconds) of a file opened once, see `read_audio`."""
    with open_audio(path, place) as audio:
        return [
            decode_span(audio, *span, sample_rate, channel) for span in spans
        ]


@contextlib.contextmanager
def open_audio(
    path: str | os.PathLike, place: Sequence[int] | None = None
) -> Iterator[soundfile.SoundFile]:
    """Opens an audio file; errors there and in the block become BadAudio."""
    if not os.path.isfile(path):
        raise BadAudio(_why_unreadable(path, None))
    source = contextlib.nullcontext(str(path))
    quiet = contextlib.nullcontext()
    if str(path).lower().endswith(".mp3"):
        quiet = _without_notes()
    try:
        if place is not None:
            source = Member(path, *place)
        with quiet, source as content, soundfile.SoundFile(content) as audio:
            yield audio
    # Of RuntimeError only soundfile's: torch's, for lack of memory, is not the
    # file's fault.
    except (OSError, soundfile.SoundFileError) as error:
        raise BadAudio(_why_unreadable(path, error)) from error
    except MemoryError as error:
        raise BadAudio("is said to be larger than the memory") from error
    except UnicodeEncodeError as error:
        raise BadAudio("name is not UTF-8: rename the file") from error
    except TypeError as error:
        # soundfile wants the format of a file called .raw as an argument.
        raise BadAudio("has no header") from error


@contextlib.contextmanager
def _without_notes():
    """Drops libmpg123's notes from stderr; all other text passes."""
    # libmpg123 writes from C to file descriptor 2, not to sys.stderr. Done in
    # the main thread only: two threads that replace the descriptor at the same
    # time could each restore the other's.
    original = None
    with contextlib.suppress(OSError):  # a daemon may have closed stderr
        if threading.current_thread() is threading.main_thread():
            original = os.dup(2)
    if original is None:
        yield
        return
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(original, 2)
            os.close(original)
            caught.seek(0)
            for line in caught:
                if not MPG123_NOTES.match(line):
                    os.write(2, line)


def _why_unreadable(path, error):
    """Returns the reason why a file could not be opened or read.

    The file system is asked first, because libsndfile reports all of the file
    system's errors as "System error". Raises StorageFailure if the file is not
    to blame: otherwise a server that fails for a minute would turn good files
    into bad ones.
    """
    if isinstance(error, OSError):
        check_storage(path, error)
    if os.path.exists(path) and not os.path.isfile(path):
        # Opening a named pipe would block the worker until somebody writes.
        return "is not a regular file"
    try:
        with open(path, "rb") as audio:
            empty = not audio.read(1)
    except OSError as refusal:
        check_storage(path, refusal)
        return f"cannot be opened: {refusal.strerror}"
    if empty:
        return "is empty"
    reason = str(getattr(error, "error_string", error))
    if reason.startswith("File does not exist"):
        # libsndfile's words for an mp3 without a frame.
        reason = "it holds no audio"
    return f"cannot be read: {reason}"


def decode_span(
    audio: soundfile.SoundFile,
    start: float,
    seconds: float | None,
    sample_rate: int,
    channel: int | None,
) -> torch.Tensor:
    """Reads one span of an open file, as `read_audio` returns it."""
    check_rate(audio.samplerate, sample_rate)
    wav = torch.from_numpy(_read_mono(audio, start, seconds, channel))
    if audio.samplerate != sample_rate:
        wav = torchaudio.functional.resample(wav, audio.samplerate, sample_rate)
    return wav


def _read_mono(audio, start, seconds, channel):
    """Reads one span of an open file, mixed to mono block by block."""
    rate, channels = audio.samplerate, audio.channels
    _check_channel(channels, channel)
    if not audio.seekable():  # GSM 6.10 and other codings of telephones
        raise BadAudio(
            f"is coded as {audio.subtype_info}, which can only be read from "
            "the beginning: convert it to wav of 16 bits"
        )
    first = round(start * rate)
    if first >= audio.frames > 0:  # a manifest's start may be wrong
        raise BadAudio(
            f"is read from {start:.2f} s on, but ends at "
            f"{audio.frames / rate:.2f} s"
        )
    first = min(first, audio.frames)
    audio.seek(first)
    left = audio.frames - first
    if seconds is not None:
        left = min(left, round(seconds * rate))
    # Read as integers: libsndfile takes three times as long as numpy to convert
    # them to floats. Integers are finite, so their peak needs no check.
    is_16_bit = audio.subtype == "PCM_16"
    blocks = []
    while left > 0:
        wanted = min(left, max(BLOCK // channels, 1))
        try:
            block = audio.read(wanted, "int16" if is_16_bit else "float32")
        except ValueError as error:
            # soundfile allocates the header's length minus the position. The
            # size is negative after a seek beyond the header's length.
            reason = "cannot be read: header and content differ"
            raise BadAudio(reason) from error
        if channel is not None and channels > 1:
            block = block[:, channel]
        if is_16_bit:
            block = block.astype(np.float32)
            block *= 1 / 32768
        elif len(block):
            _check_peak(np.abs(block).max())
        blocks.append(block if block.ndim == 1 else block.mean(axis=1))
        left -= wanted
        if len(block) < wanted:
            break
    if not sum(map(len, blocks)):
        raise BadAudio("holds no samples")
    return np.concatenate(blocks)


def _check_peak(peak):
    """Raises BadAudio if the largest magnitude is too large or not finite."""
    if not peak <= MAX_SAMPLE:  # a NaN fails every comparison
        finite = np.isfinite(peak)
        extent = f"up to {peak:.1g}" if finite else "that are not finite"
        raise BadAudio(f"holds samples {extent}")


def check_sound(wav: torch.Tensor, has_sound_alone: Callable[[], bool]) -> None:
    """Raises BadAudio if a waveform (time,) is silent.

    `has_sound_alone` tells whether the waveform is a mean of channels, of
    which the first has sound.
    """
    if not is_silent(wav):
        return
    if has_sound_alone():
        raise BadAudio(
            "is silent as the mean of its channels, which cancel each other: "
            "name one by --channel, or in the column channel of a manifest"
        )
    raise BadAudio(
        "is silent: no sample that was read is above "
        f"{20 * math.log10(SILENCE):.0f} dB of full scale"
    )


def is_silent(wav: torch.Tensor) -> bool:
    """Tells whether no sample of a waveform exceeds `SILENCE`."""
    return not wav.abs().max() > SILENCE


def sounds(
    audio: soundfile.SoundFile,
    start: float,
    end: float,
    sample_rate: int,
    channel: int | None,
) -> Iterator[torch.Tensor]:
    """Yields the times (s) of samples with sound, one array a minute.

    Minutes without sound are skipped.
    """
    end = min(end, audio.frames / audio.samplerate)
    while (end - start) * audio.samplerate >= 1:
        piece = min(SEARCH_SECONDS, end - start)
        wav = decode_span(audio, start, piece, sample_rate, channel)
        (loud,) = torch.where(wav.abs() > SILENCE)
        if len(loud):
            yield start + loud.double() / sample_rate
        start += SEARCH_SECONDS


def read_beginning(
    wav: str | os.PathLike,
    offset: float,
    duration: float,
    limit: float,
    sample_rate: int = 16000,
    place: Sequence[int] | None = None,
    channel: int | None = None,
) -> torch.Tensor:
    """Reads the first `limit` seconds of the utterance at `offset` in a file.

    If they are silent, reads `limit` seconds from the first sound on instead.
    Raises BadAudio if there is no sound. For the rest see `read_audio`.
    """

    def read(channel):
        source = sample_rate, place, channel
        part = read_audio(wav, offset, min(duration, limit), *source)
        if is_silent(part) and duration > limit:
            return _read_from_sound(wav, part, offset, duration, limit, *source)
        return part

    part = read(channel)
    check_sound(part, lambda: channel is None and not is_silent(read(0)))
    return part


@patient
def _read_from_sound(
    path, wav, offset, duration, limit, sample_rate, place, channel
):
    """Reads `limit` seconds from the first sound after the first `limit`.

    Returns the silent `wav` if there is no sound.
    """
    end = offset + duration
    with open_audio(path, place) as audio:
        later = sounds(audio, offset + limit, end, sample_rate, channel)
        for times in later:
            start = times[0].item()
            piece = min(limit, end - start)
            return decode_span(audio, start, piece, sample_rate, channel)
    return wav


class Member(io.FileIO):
    """A range of a file's bytes, read as if it were a file of its own.

    It lets soundfile decode an audio file inside a shard without a copy.
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

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer up to the end of the range; returns the byte count."""
        left = max(self._length - self.tell(), 0)
        return super().readinto(memoryview(buffer).cast("B")[:left])

    # FileIO's own methods read past the range's end; these call `readinto`.
    read = io.RawIOBase.read  # type: ignore[assignment]
    readall = io.RawIOBase.readall
