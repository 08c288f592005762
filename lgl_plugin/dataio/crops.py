"""Random crops of utterances; a silent crop is replaced by one with sound."""

import functools
import itertools
import math
import os
import random
from collections.abc import Sequence

import torch
import torchaudio

from lgl_plugin.dataio.audio import (
    check_sound,
    decode_span,
    is_silent,
    open_audio,
    read_spans,
    sounds,
)
from lgl_plugin.dataio.storage import patient


def read_crops(
    wav: str | os.PathLike,
    offset: float,
    duration: float,
    crop: float,
    n_crops: int = 1,
    sample_rate: int = 16000,
    rng: random.Random = random,  # type: ignore[assignment]
    place: Sequence[int] | None = None,
    channel: int | None = None,
    speed: int = 100,
    overlap: bool = False,
) -> torch.Tensor:
    """Reads random crops of the utterance at `offset` in a file.

    Returns float32 (n_crops, crop * sample_rate); offset, duration and crop
    are in seconds. Crops are disjoint unless they may `overlap`. `speed`, in
    %, scales pitch and formants, too, as on a tape.

    A silent crop is replaced by one with sound. The search starts at the
    silent crop, goes on minute by minute to the utterance's end, and then from
    the utterance's beginning. The new crop overlaps other crops only if there
    is no sound elsewhere. Raises BadAudio if there is no sound at all.
    """
    n_samples = round(crop * sample_rate)
    n_read, crop = math.ceil(n_samples * speed / 100), crop * speed / 100
    spans = crop_spans(duration, crop, n_crops, rng, overlap)
    spans = [(offset + start, seconds) for start, seconds in spans]
    crops = read_spans(wav, spans, sample_rate, place, channel)
    if any(map(is_silent, crops)):
        starts = [start for start, _ in spans]
        whole = offset, duration, min(crop, duration)
        source = sample_rate, place, channel
        crops = _replace_silent(wav, crops, starts, *whole, *source)
    wavs = torch.stack([wrap(part, n_read) for part in crops])
    if speed != 100:
        wavs = _resampler(speed)(wavs)
    return wavs[:, :n_samples]


@functools.lru_cache
def _resampler(speed):
    """Makes a speed's filter, cached: making it takes as long as using it."""
    return torchaudio.transforms.Resample(speed, 100)


def crop_spans(
    duration: float,
    crop: float,
    n_crops: int,
    rng: random.Random,
    overlap: bool = False,
) -> list[tuple[float, float]]:
    """Draws start and length of crops, all in seconds.

    Crops that may overlap are drawn independently. Otherwise crops are
    disjoint, and their positions are uniformly random if there is room for
    all. A shorter utterance is cut into equal parts, which `read_crops`
    repeats to full length. The order is random, so that neither view of
    Stage I is always the earlier one (paper, section 2.1).
    """
    if overlap:
        length = min(crop, duration)
        starts = [rng.uniform(0.0, duration - length) for _ in range(n_crops)]
        return [(start, length) for start in starts]
    length = min(crop, duration / n_crops)
    slack = max(duration - n_crops * length, 0.0)
    # Sorted cuts of the slack are the gaps between crops laid end to end.
    cuts = sorted(rng.uniform(0.0, slack) for _ in range(n_crops))
    spans = [(cut + i * length, length) for i, cut in enumerate(cuts)]
    rng.shuffle(spans)
    return spans


@patient
def _replace_silent(
    path, crops, starts, offset, duration, size, sample_rate, place, channel
):
    """Replaces the silent ones among crops, see `read_crops`."""
    taken = [at for at, wav in zip(starts, crops) if not is_silent(wav)]
    end = offset + duration
    replaced = []
    with open_audio(path, place) as audio:

        def has_sound_alone():
            if channel is not None or audio.channels == 1:
                return False
            return any(True for _ in sounds(audio, offset, end, sample_rate, 0))

        for own, wav in zip(starts, crops):
            if is_silent(wav):
                sound_times = itertools.chain(
                    sounds(audio, own, end, sample_rate, channel),
                    sounds(audio, offset, own, sample_rate, channel),
                )
                # Crops centred on a sample with sound, inside the utterance.
                places = (
                    (times - size / 2).clamp(max=end - size).clamp(min=offset)
                    for times in sound_times
                )
                start = _draw_place(places, taken, size, own)
                if start is not None:
                    taken.append(start)
                    wav = decode_span(audio, start, size, sample_rate, channel)
                check_sound(wav, has_sound_alone)
            replaced.append(wav)
    return replaced


def _draw_place(stretches, taken, size, seed):
    """Draws a start from the first stretch with a start away from `taken`.

    If every start is near a taken one, draws from the first stretch. Returns
    None if there is no stretch.
    """
    # Not the caller's generator: what is drawn from that later must not depend
    # on whether this crop is silent.
    rng = random.Random(seed)
    fallback = None
    for starts in stretches:
        away = torch.ones_like(starts, dtype=torch.bool)
        for start in taken:
            away &= (starts - start).abs() >= size
        if away.any():
            return rng.choice(starts[away]).item()
        if fallback is None:
            fallback = rng.choice(starts).item()
    return fallback


def wrap(wav: torch.Tensor, n_samples: int) -> torch.Tensor:
    """Repeats a waveform (time,) end to end, and cuts it at `n_samples`."""
    if len(wav) < n_samples:
        wav = wav.repeat(-(-n_samples // len(wav)))
    return wav[:n_samples]
