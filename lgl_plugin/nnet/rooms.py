"""Rooms and channels for augmentation: recorded or simulated filters."""

import functools
import pathlib

import torch

from lgl_plugin.dataio.audio import BadAudio, read_audio
from lgl_plugin.nnet.noise import DB_PER_OCTAVE
from lgl_plugin.utils.progress import tqdm

SECONDS = 0.5  # kept of an impulse response
MOST = 20000  # impulse responses kept in memory, 16 kB each
# Files whose median share of energy in the second half of `SECONDS` is larger
# are not impulse responses. 15 measured rooms had 0.01 in the median and at
# most 0.14; speech and noise had 0.3 in the median.
LATE = 0.2


# Cached, because `lgl train` makes the augmentation of each yaml several times.
@functools.lru_cache(maxsize=1)
def impulse_responses(
    files: tuple[pathlib.Path, ...], sample_rate: int
) -> torch.Tensor:
    """Reads impulse responses, each from its direct path on.

    Returns float16 (n, SECONDS * sample_rate), whose first sample is 1. Callers
    share the tensor and must not change it. Of more than `MOST` files an even
    selection is read. Raises BadAudio if a file cannot be used, and ValueError
    if most responses do not fade as rooms do: convolution with recordings of
    speech would turn all audio into noise.
    """
    n_samples = round(SECONDS * sample_rate)
    files = files[:: -(-len(files) // MOST)]
    rooms = torch.zeros(len(files), n_samples, dtype=torch.float16)
    late = torch.zeros(len(files))
    for number, path in enumerate(tqdm(files, desc="rooms", unit="file")):
        try:
            # The mean of several microphones would be a comb filter.
            wav = read_audio(path, 0.0, None, sample_rate, channel=0)
        except BadAudio as error:
            raise BadAudio(f"impulse response {path} {error}") from error
        peak = int(wav.abs().argmax())
        if wav[peak] == 0:
            raise BadAudio(f"impulse response {path} is silent")
        wav = wav[peak : peak + n_samples] / wav[peak]
        rooms[number, : len(wav)] = wav.half()
        late[number] = wav[n_samples // 2 :].square().sum() / wav.square().sum()
    if late.median() > LATE:
        raise ValueError(
            f"rir_folder: most of {len(files)} files, such as "
            f"{files[int(late.argmax())]}, do not fade within {SECONDS} s, as "
            "impulse responses of rooms do. Are they recordings? Name a folder "
            "of impulse responses, such as RIRS_NOISES, or leave rir_folder "
            "out: rooms are then simulated"
        )
    return rooms


def draw_rooms(
    n_rooms: int, sample_rate: int, device: str | torch.device = "cpu"
) -> torch.Tensor:
    """Simulates rooms: a direct path, then exponentially fading noise.

    The reverberation time (60 dB) is drawn from 0.1 to 0.8 s, the ratio of
    direct to reverberant energy from -3 to 15 dB. Returns float32 (n_rooms,
    SECONDS * sample_rate), whose first sample is 1.
    """
    time = torch.arange(round(SECONDS * sample_rate), device=device)
    fade = 0.1 + 0.7 * torch.rand(n_rooms, 1, device=device)
    envelope = (-60.0 / DB_PER_OCTAVE / sample_rate * time / fade).exp2()
    tail = torch.randn(n_rooms, len(time), device=device) * envelope
    tail[:, : round(0.002 * sample_rate)] = 0.0  # no echo before 2 ms
    ratio = -3.0 + 18.0 * torch.rand(n_rooms, 1, device=device)
    rooms = tail / tail.square().sum(1, keepdim=True).sqrt()
    rooms = rooms * 10 ** (-ratio / 20)
    rooms[:, 0] = 1.0
    return rooms


def draw_channels(
    n_channels: int,
    bins: int,
    sample_rate: int,
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    """Draws frequency responses of microphones and lines.

    Each is a tilt of up to 4 dB an octave, a smooth curve of up to +-8 dB, and
    in one of three a telephone band (about 300 to 3,400 Hz). Returns gains,
    shape (n_channels, bins), float32, from 0 Hz to half the sampling rate.
    """

    def uniform(low, high, *shape):
        shape = (n_channels, *shape)
        return low + (high - low) * torch.rand(shape, device=device)

    hertz = torch.linspace(0.0, sample_rate / 2, bins, device=device)
    octave = (hertz.clamp(min=62.5) / 1000.0).log2()
    curve = torch.nn.functional.interpolate(
        uniform(-8.0, 8.0, 1, 12), size=256, mode="linear", align_corners=True
    )[:, 0]
    # The 12 knots are evenly spaced in octaves, as hearing and channels vary by
    # octaves rather than by Hz.
    position = (octave - octave[0]) / (octave[-1] - octave[0]) * 255
    decibels = curve[:, position.long()] + uniform(-4.0, 4.0, 1) * octave
    low, high = uniform(200.0, 400.0, 1), uniform(3000.0, 3800.0, 1)
    outside = (low / hertz.clamp(min=1.0)).log2().clamp(min=0.0)
    outside = outside + (hertz / high).log2().clamp(min=0.0)
    narrow = uniform(0.0, 1.0, 1) < 1 / 3
    # The telephone band falls by 40 dB an octave on either side.
    decibels = decibels - torch.where(narrow, 40.0 * outside, 0.0)
    return 10 ** (decibels.clamp(min=-60.0) / 20)
