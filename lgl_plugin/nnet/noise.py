"""Noise for augmentation: recordings, babble and coloured noise."""

import functools
import math
import pathlib
from collections.abc import Callable

import numpy as np
import scipy.fft
import torch
import torch.nn.functional as F
from speechbrain.utils.logger import get_logger

from lgl_plugin.dataio.audio import BadAudio, read_audio
from lgl_plugin.dataio.crops import wrap
from lgl_plugin.utils.progress import tqdm

logger = get_logger(__name__)

# Range of signal-to-noise ratios in dB by kind of noise, as in the paper's
# release. The ratio of babble is that of each talker.
SNR = {"noise": (0.0, 15.0), "speech": (13.0, 20.0), "music": (5.0, 15.0)}
TALKERS = (3, 8)  # of babble, both ends included
DB_PER_OCTAVE = 20 * math.log10(2)  # of an amplitude that doubles
# Widest band, as a share of the mel scale, and longest stretch, in seconds,
# that `blanked` sets to zero: 5 of 80 bands and 9 frames.
BLANKED_BAND, BLANKED_SECONDS = 5 / 80, 0.09
SILENCE = 1e-10  # mean square below which a waveform counts as silent
ROWS = 32  # a GPU's Fourier transforms get a multiple of 32 rows


class NoiseBank(torch.nn.Module):
    """Recordings of one kind of noise in memory, 2 bytes per sample.

    They are read in a fixed random order until the bank is full. Unreadable
    recordings are left out; BadAudio if none can be read.
    """

    def __init__(
        self, files: list[pathlib.Path], sample_rate: int, max_seconds: float
    ):
        super().__init__()
        self.samples: torch.Tensor
        samples = _read_noise(tuple(files), sample_rate, max_seconds)
        self.register_buffer("samples", samples, persistent=False)

    def forward(
        self,
        source: torch.Tensor,
        count: torch.Tensor,
        total: int,
        n_samples: int,
    ) -> torch.Tensor:
        """Sums stretches of the bank to noise (batch, n_samples), float32.

        Both `source` and `count` are (batch,). `source`, in [0, 1), is the
        place in the bank of each waveform's last stretch. `count`, int64, is
        its number of stretches. `total` is the sum of `count`, which the host
        cannot read without waiting for a GPU.
        """
        samples, device = self.samples, self.samples.device
        if len(samples) < 2 * n_samples:  # a small bank is repeated
            samples = wrap(samples, 2 * n_samples)
        stretches = samples.unfold(0, n_samples, 1)
        row = torch.arange(len(source), device=device)
        row = row.repeat_interleave(count, output_size=total)
        # One stretch of each waveform comes from `source`, all others from a
        # random place.
        place = torch.rand(total, device=device)
        place[count.cumsum(0) - 1] = source
        start = (place * len(self.samples)).long()
        # Two crops that share a draw get different stretches of one recording.
        start = start + torch.randint(n_samples, (total,), device=device)
        chosen = stretches.index_select(0, start % len(stretches)).float()
        noise = torch.zeros(len(source), n_samples, device=device)
        return noise.index_add_(0, row, chosen).mul_(1 / 32767)


# Cached, because `lgl train` makes the augmentation of each yaml several times.
@functools.lru_cache(maxsize=len(SNR))
def _read_noise(files, sample_rate, max_seconds):
    """Reads recordings to one block, int16 (samples,), which callers share."""
    remaining = round(max_seconds * sample_rate)
    order = np.random.default_rng(0).permutation(len(files))
    pieces, bad = [], []
    for index in tqdm(order, desc="noise bank", unit="file"):
        try:
            # The limit keeps a recording of hours from being decoded whole.
            wav = read_audio(files[index], 0.0, max_seconds, sample_rate)
        except BadAudio as error:
            bad.append(f"{files[index]} {error}")
            continue
        # Equal loudness makes all talkers of a babble equally loud.
        wav = wav[:remaining] / mean_square(wav[None]).sqrt()[0] * 0.05
        pieces.append((wav.clamp(-1, 1) * 32767).to(torch.int16))
        remaining -= len(wav)
        if remaining <= 0:
            break
    if not pieces:
        raise BadAudio(f"no noise recording can be read: {bad[0]}")
    if bad:
        logger.warning(
            "%d noise recordings are left out; the first: %s",
            len(bad),
            bad[0],
        )
    return torch.cat(pieces)


def babble(
    wavs: torch.Tensor, rows: torch.Tensor, count: torch.Tensor
) -> torch.Tensor:
    """Sums other waveforms of the batch (batch, time), equally loud.

    `rows` (n,), int64, get babble (n, time) of `count` (n,) talkers each, or of
    all other waveforms if the batch has fewer.
    """
    batch = len(wavs)
    rank = torch.rand(len(rows), batch, device=wavs.device)
    # A waveform is never a talker of its own babble.
    rank.scatter_(1, rows[:, None], 2.0)
    rank = rank.argsort(1).argsort(1)
    chosen = (rank < count.clamp(max=batch - 1)[:, None]).float()
    return (chosen / mean_square(wavs).sqrt().T) @ wavs


def coloured_noise(slope: torch.Tensor, n_samples: int) -> torch.Tensor:
    """Draws Gaussian noise (n, n_samples), float32, of mean square 1.

    `slope` (n,) is the slope of the spectrum in dB per octave: 0 is white, -3
    pink, -6 brown.
    """
    n_fft = scipy.fft.next_fast_len(n_samples, real=True)
    bins = n_fft // 2 + 1
    octave = torch.arange(bins, device=slope.device).clamp(min=1).log2()
    gain = (slope[:, None] / DB_PER_OCTAVE * octave).exp2()
    shape = (len(slope), bins, 2)
    spectrum = torch.view_as_complex(torch.randn(shape, device=slope.device))
    spectrum *= gain
    noise = transformed(torch.fft.irfft, spectrum, n_fft)[:, :n_samples]
    return noise / mean_square(noise).sqrt()


def blanked(wavs: torch.Tensor, sample_rate: int) -> torch.Tensor:
    """Sets a random band and stretch of each waveform (n, time) to zero."""
    n_rows, n_samples = wavs.shape
    width, low, length, begin = torch.rand(4, n_rows, 1, device=wavs.device)
    n_fft = scipy.fft.next_fast_len(n_samples, real=True)
    hertz = torch.fft.rfftfreq(n_fft, 1 / sample_rate, device=wavs.device)
    mels = (1 + hertz / 700).log()
    mels = mels / mels[-1]
    width = width * BLANKED_BAND
    low = low * (1 - width)
    spectrum = transformed(torch.fft.rfft, wavs, n_fft)
    spectrum.masked_fill_((mels >= low) & (mels < low + width), 0)
    wavs = transformed(torch.fft.irfft, spectrum, n_fft)[:, :n_samples]
    length = length * BLANKED_SECONDS * sample_rate
    begin = begin * (n_samples - length)
    places = torch.arange(n_samples, device=wavs.device)
    return wavs.masked_fill((places >= begin) & (places < begin + length), 0)


def mean_square(wavs: torch.Tensor) -> torch.Tensor:
    """Returns the power of each waveform, (batch, 1), at least `SILENCE`."""
    norm = torch.linalg.vector_norm(wavs, dim=1, keepdim=True)
    return (norm.square() / wavs.shape[1]).clamp(min=SILENCE)


def transformed(
    transform: Callable[..., torch.Tensor], rows: torch.Tensor, n_fft: int
) -> torch.Tensor:
    """Transforms rows (n, length) by `torch.fft.rfft` or `irfft`."""
    n_rows = len(rows)
    # cuFFT makes a plan for each number of rows, which varies from draw to
    # draw.
    if rows.device.type != "cpu" and n_rows % ROWS:
        rows = F.pad(rows, (0, 0, 0, -n_rows % ROWS))
    return transform(rows, n_fft)[:n_rows]
