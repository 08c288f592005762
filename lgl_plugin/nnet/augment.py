"""Augmentation of a whole batch on the model's device.

Each waveform gets its own room, channel, noise and signal-to-noise ratio. A
`Draw` holds what was drawn, so that Stage I can put the same augmentation on
two crops (paper, section 2.1; Huh et al. 2020). MUSAN and RIRS_NOISES are
used when their folders are given; without them babble is made of the batch's
own speech, noise is coloured and rooms are simulated.

What is decided per waveform is drawn on the CPU and sent; what is as long as
a waveform is drawn where the waveforms are. So nothing is read back from the
device, and the CPU runs ahead of it.
"""

import dataclasses
import math
import pathlib

import numpy as np
import scipy.fft
import torch
from speechbrain.utils.autocast import fwd_default_precision
from speechbrain.utils.logger import get_logger
from tqdm import tqdm

from lgl_plugin.dataio.audio import BadAudio, read_audio, wrap

logger = get_logger(__name__)

# Signal-to-noise ratios in dB by kind of noise, as in the paper's release.
SNR = {"noise": (0.0, 15.0), "speech": (13.0, 20.0), "music": (5.0, 15.0)}
TALKERS = (3, 8)  # of babble, both ends included
DB_PER_OCTAVE = 20 * math.log10(2)  # of an amplitude that doubles
SILENCE = 1e-10  # mean square below which a waveform counts as silent


@dataclasses.dataclass
class Draw:
    """What was drawn for each waveform of a batch.

    All but the responses lie on the CPU.

    Arguments
    ---------
    filtered : torch.Tensor
        Which waveforms go through a room or a channel, int64, shape (n,).
    response : torch.Tensor
        Their frequency responses, complex64, shape (n, n_fft // 2 + 1), on
        the augmenter's device.
    n_fft : int
        Length of the transform that they belong to.
    kind : torch.Tensor
        Index into the augmenter's kinds of noise, -1 for none, int64, (batch,).
    source : torch.Tensor
        In [0, 1), picks the recording of that kind, (batch,).
    colour : torch.Tensor
        Spectral slope of coloured noise, dB per octave, (batch,).
    snr : torch.Tensor
        In dB, (batch,).

    Example
    -------
    >>> augment = Augmenter(sample_rate=16000)
    >>> draw = augment.draw(4, 8000)
    >>> draw.kind.shape, draw.filtered.dtype
    (torch.Size([4]), torch.int64)
    >>> augment(torch.randn(4, 8000), draw).shape
    torch.Size([4, 8000])
    """

    filtered: torch.Tensor
    response: torch.Tensor
    n_fft: int
    kind: torch.Tensor
    source: torch.Tensor
    colour: torch.Tensor
    snr: torch.Tensor


class Augmenter(torch.nn.Module):
    """Reverberation and noise, drawn per waveform.

    Arguments
    ---------
    sample_rate : int
        In Hz.
    musan_folder : str, optional
        MUSAN, with its folders noise, speech and music.
    rir_folder : str, optional
        RIRS_NOISES, or any folder of impulse responses.
    reverb_only, noise_only : float
        Probabilities; the rest of the waveforms get both. The paper's
        release has 1/4, 1/4 and so 1/2.
    channel : float
        Probability of a random frequency response (a tilt, resonances, one in
        three a telephone band). The paper has none; a small corpus, whose
        sessions would otherwise be told apart by their channel, gains by it.
    noise_snr : list of float, optional
        Range in dB that replaces the paper's 0 to 15 for noise.
    bank_seconds : float
        How much of each MUSAN kind is kept in memory, 32 kB per second.

    Raises
    ------
    FileNotFoundError
        If a folder is given that is missing or holds no audio.

    Example
    -------
    >>> augment = Augmenter()
    >>> wavs = torch.randn(4, 16000)
    >>> same = augment.draw(4, 16000)
    >>> augment(wavs, same).shape
    torch.Size([4, 16000])
    """

    def __init__(
        self,
        sample_rate=16000,
        musan_folder=None,
        rir_folder=None,
        reverb_only=0.25,
        noise_only=0.25,
        channel=0.0,
        noise_snr=None,
        bank_seconds=3600.0,
    ):
        super().__init__()
        self.sample_rate = sample_rate
        self.reverb_only = reverb_only
        self.noise_only = noise_only
        self.channel = channel
        self.banks = torch.nn.ModuleDict()
        self.register_buffer("rooms", None, persistent=False)
        if musan_folder:
            for kind in SNR:
                folder = pathlib.Path(musan_folder) / kind
                self.banks[kind] = NoiseBank(
                    audio_files(folder, "musan_folder"),
                    sample_rate,
                    bank_seconds,
                )
        if rir_folder:
            responses = [
                path
                for path in audio_files(rir_folder, "rir_folder")
                # RIRS_NOISES holds recordings of noise, too.
                if "noise" not in path.name
                and path.parts[-2] != "pointsource_noises"
            ]
            self.rooms = impulse_responses(responses, sample_rate)
        self.kinds = list(SNR) if musan_folder else ["noise", "speech"]
        ranges = {**SNR, **({"noise": noise_snr} if noise_snr else {})}
        self.snr_range = torch.tensor([ranges[kind] for kind in self.kinds])
        # Holds nothing; goes where the module goes.
        self.register_buffer("anchor", torch.empty(0), persistent=False)

    def draw(self, n_waveforms, n_samples):
        """Draws an augmentation for each of `n_waveforms`.

        Arguments
        ---------
        n_waveforms : int
            The batch's size.
        n_samples : int
            Length of its waveforms.

        Returns
        -------
        Draw
        """
        device = self.anchor.device
        profile, channel, source, colour, level = torch.rand(5, n_waveforms)
        noisy = profile >= self.reverb_only
        wet = ~noisy | (profile >= self.reverb_only + self.noise_only)
        changed = channel < self.channel
        kind = torch.randint(len(self.kinds), (n_waveforms,))
        low, high = self.snr_range[kind].unbind(1)
        # Rooms first, channels last, so that each takes one slice.
        groups = (wet & ~changed, wet & changed, ~wet & changed)
        filtered = torch.cat([group.nonzero()[:, 0] for group in groups])
        n_wet, n_changed = int(wet.sum()), int(changed.sum())
        rooms = self._draw_rooms(n_wet)
        n_fft = scipy.fft.next_fast_len(n_samples + rooms.shape[1], real=True)
        shape = (len(filtered), n_fft // 2 + 1)
        response = torch.empty(shape, dtype=torch.complex64, device=device)
        if n_wet:
            torch.fft.rfft(rooms, n_fft, out=response[:n_wet])
        response[n_wet:] = 1.0
        if n_changed:
            response[-n_changed:] *= draw_channels(
                n_changed, shape[1], self.sample_rate, device
            )
        return Draw(
            filtered=filtered,
            response=response,
            n_fft=n_fft,
            kind=torch.where(noisy, kind, -1),
            source=source,
            colour=-9.0 + 12.0 * colour,
            snr=low + (high - low) * level,
        )

    @fwd_default_precision
    def forward(self, wavs, draw=None):
        """Augments a batch, in float32 under autocast too.

        Arguments
        ---------
        wavs : torch.Tensor
            Shape (batch, time), float32.
        draw : Draw, optional
            From `draw`; a fresh one if not given. Rooms, channels, sources and
            ratios are those drawn; stretches of noise are new at each call.

        Returns
        -------
        torch.Tensor
            Shape (batch, time), float32, each row as loud as it came.
        """
        n_samples = wavs.shape[1]
        draw = draw or self.draw(*wavs.shape)
        mixed = wavs.clone()
        if len(draw.filtered):
            rows = _send(draw.filtered, wavs)
            spectrum = torch.fft.rfft(wavs.index_select(0, rows), draw.n_fft)
            spectrum *= draw.response
            wet = torch.fft.irfft(spectrum, draw.n_fft)[:, :n_samples]
            mixed.index_copy_(0, rows, wet)
        level = mean_square(mixed)
        for rows, noise in self._noises(wavs, draw):
            ratio = _send(10 ** (-draw.snr[rows, None] / 20), wavs)
            rows = _send(rows, wavs)
            gain = ratio * (level[rows] / mean_square(noise)).sqrt()
            mixed.index_add_(0, rows, noise.mul_(gain))
        return mixed.mul_((mean_square(wavs) / mean_square(mixed)).sqrt())

    def _draw_rooms(self, n_rooms):
        if self.rooms is None:
            return draw_rooms(n_rooms, self.sample_rate, self.anchor.device)
        chosen = torch.randint(len(self.rooms), (n_rooms,))
        return self.rooms.index_select(0, _send(chosen, self.rooms)).float()

    def _noises(self, wavs, draw):
        """For each kind, which rows get it and their noise, (rows, time)."""
        n_samples = wavs.shape[1]
        for index, kind in enumerate(self.kinds):
            rows = (draw.kind == index).nonzero()[:, 0]
            if not len(rows):
                continue
            if kind in self.banks:
                talkers = TALKERS if kind == "speech" else (1, 1)
                yield (
                    rows,
                    self.banks[kind](draw.source[rows], n_samples, talkers),
                )
            elif kind == "speech":
                yield rows, babble(wavs, rows)
            else:
                colour = _send(draw.colour[rows], wavs)
                yield rows, coloured_noise(colour, n_samples)


class NoiseBank(torch.nn.Module):
    """Recordings of one kind in one block of memory, of a stated size.

    Arguments
    ---------
    files : list of pathlib.Path
        Recordings; read in a fixed random order until the bank is full.
    sample_rate : int
        In Hz.
    max_seconds : float
        Size of the bank, 2 bytes a sample.

    Example
    -------
    >>> import soundfile
    >>> path = getfixture("tmp_path") / "hum.wav"
    >>> soundfile.write(path, np.sin(np.arange(32000)), 16000)
    >>> bank = NoiseBank([path], 16000, max_seconds=1.0)
    >>> bank(torch.tensor([0.2, 0.7]), 4000, (1, 1)).shape
    torch.Size([2, 4000])
    """

    def __init__(self, files, sample_rate, max_seconds):
        super().__init__()
        room = round(max_seconds * sample_rate)
        order = np.random.default_rng(0).permutation(len(files))
        pieces, bad = [], []
        for index in tqdm(order, desc="noise bank", unit="file"):
            try:
                wav = read_audio(files[index], 0.0, None, sample_rate)
            except BadAudio as error:
                bad.append(f"{files[index]} {error}")
                continue
            # The same loudness for all, so that babble is of equal talkers.
            wav = wav[:room] / mean_square(wav[None]).sqrt()[0] * 0.05
            pieces.append((wav.clamp(-1, 1) * 32767).to(torch.int16))
            room -= len(wav)
            if room <= 0:
                break
        if bad:
            logger.warning(
                "%d noise recordings are left out; the first: %s",
                len(bad),
                bad[0],
            )
        if not pieces:
            raise BadAudio(f"no noise recording can be read: {bad[0]}")
        self.register_buffer("samples", torch.cat(pieces), persistent=False)

    def forward(self, source, n_samples, talkers):
        """Takes stretches near where `source` points, summing `talkers`.

        Arguments
        ---------
        source : torch.Tensor
            In [0, 1), shape (batch,), on the CPU: the place of the recording
            in the bank.
        n_samples : int
            Length of a stretch.
        talkers : (int, int)
            Fewest and most stretches to sum.

        Returns
        -------
        torch.Tensor
            Shape (batch, n_samples), float32.
        """
        fewest, most = talkers
        samples = self.samples
        if len(samples) < 2 * n_samples:  # it goes round
            samples = wrap(samples, 2 * n_samples)
        stretches = samples.unfold(0, n_samples, 1)
        count = torch.randint(fewest, most + 1, (len(source),))
        row = torch.arange(len(source)).repeat_interleave(count)
        # Talkers after the first come from anywhere in the bank; a new
        # stretch begins within one length of the place that was drawn.
        place = torch.rand(len(row))
        place[count.cumsum(0) - 1] = source
        start = (place * len(self.samples)).long()
        start = start + torch.randint(n_samples, (len(row),))
        start = _send(start % len(stretches), samples)
        total = torch.zeros(len(source), n_samples, device=samples.device)
        chosen = stretches.index_select(0, start).float()
        return total.index_add_(0, _send(row, samples), chosen).mul_(1 / 32767)


def babble(wavs, rows):
    """Sums of 3 to 8 other waveforms of the batch, of equal loudness.

    Arguments
    ---------
    wavs : torch.Tensor
        Shape (batch, time).
    rows : torch.Tensor
        Which waveforms get babble, int64, shape (n,), on the CPU.

    Returns
    -------
    torch.Tensor
        Shape (n, time).

    Example
    -------
    >>> babble(torch.randn(9, 100), torch.tensor([0, 5])).shape
    torch.Size([2, 100])
    """
    batch = len(wavs)
    rank = torch.rand(len(rows), batch)
    rank.scatter_(1, rows[:, None], 2.0)  # nobody babbles over themselves
    rank = rank.argsort(1).argsort(1)
    low, high = TALKERS
    count = torch.randint(low, high + 1, (len(rows), 1)).clamp(max=batch - 1)
    chosen = _send((rank < count).float(), wavs)
    return (chosen / mean_square(wavs).sqrt().T) @ wavs


def coloured_noise(slope, n_samples):
    """Gaussian noise whose spectrum falls or rises by so many dB an octave.

    Arguments
    ---------
    slope : torch.Tensor
        dB per octave, shape (n,); 0 is white, -3 pink, -6 brown.
    n_samples : int
        Length.

    Returns
    -------
    torch.Tensor
        Shape (n, n_samples), float32.

    Example
    -------
    >>> coloured_noise(torch.tensor([0.0, -6.0]), 1000).shape
    torch.Size([2, 1000])
    """
    n_fft = scipy.fft.next_fast_len(n_samples, real=True)
    bins = n_fft // 2 + 1
    octave = torch.arange(bins, device=slope.device).clamp(min=1).log2()
    gain = (slope[:, None] / DB_PER_OCTAVE * octave).exp2()
    shape = (len(slope), bins, 2)
    spectrum = torch.view_as_complex(torch.randn(shape, device=slope.device))
    spectrum *= gain
    noise = torch.fft.irfft(spectrum, n_fft)[:, :n_samples]
    return noise / mean_square(noise).sqrt()


def draw_rooms(n_rooms, sample_rate, device="cpu", seconds=0.5):
    """Simulated rooms: a direct path, then exponentially fading noise.

    The time to fade by 60 dB is drawn from 0.1 to 0.8 s, the ratio of direct
    to reverberant energy from -3 to 15 dB.

    Arguments
    ---------
    n_rooms : int
        How many.
    sample_rate : int
        In Hz.
    device : str or torch.device
        Where to make them.
    seconds : float
        Length of the responses.

    Returns
    -------
    torch.Tensor
        Shape (n_rooms, seconds * sample_rate), float32, direct path first.

    Example
    -------
    >>> draw_rooms(3, 16000).shape
    torch.Size([3, 8000])
    """
    time = torch.arange(round(seconds * sample_rate), device=device)
    fade = 0.1 + 0.7 * torch.rand(n_rooms, 1, device=device)
    envelope = (-60.0 / DB_PER_OCTAVE / sample_rate * time / fade).exp2()
    tail = torch.randn(n_rooms, len(time), device=device) * envelope
    tail[:, : round(0.002 * sample_rate)] = 0.0  # nothing before 2 ms
    ratio = -3.0 + 18.0 * torch.rand(n_rooms, 1, device=device)
    rooms = tail / tail.square().sum(1, keepdim=True).sqrt()
    rooms = rooms * 10 ** (-ratio / 20)
    rooms[:, 0] = 1.0
    return rooms


def draw_channels(n_channels, bins, sample_rate, device="cpu"):
    """Random frequency responses of microphones and lines.

    A tilt of up to 4 dB an octave, a smooth curve of up to +-8 dB, and in one
    of three a telephone band (about 300 to 3,400 Hz).

    Arguments
    ---------
    n_channels : int
        How many.
    bins : int
        Number of frequencies from 0 Hz to half the sampling rate.
    sample_rate : int
        In Hz.
    device : str or torch.device
        Where to make them.

    Returns
    -------
    torch.Tensor
        Gains, shape (n_channels, bins), float32.

    Example
    -------
    >>> draw_channels(3, 129, 16000).shape
    torch.Size([3, 129])
    """

    def uniform(low, high, *shape):
        shape = (n_channels, *shape)
        return low + (high - low) * torch.rand(shape, device=device)

    hertz = torch.linspace(0.0, sample_rate / 2, bins, device=device)
    octave = (hertz.clamp(min=62.5) / 1000.0).log2()
    curve = torch.nn.functional.interpolate(
        uniform(-8.0, 8.0, 1, 12), size=256, mode="linear", align_corners=True
    )[:, 0]
    # Twelve knots spread over octaves, where hearing and channels vary.
    position = (octave - octave[0]) / (octave[-1] - octave[0]) * 255
    decibels = curve[:, position.long()] + uniform(-4.0, 4.0, 1) * octave
    low, high = uniform(200.0, 400.0, 1), uniform(3000.0, 3800.0, 1)
    outside = (low / hertz.clamp(min=1.0)).log2().clamp(min=0.0)
    outside = outside + (hertz / high).log2().clamp(min=0.0)
    narrow = uniform(0.0, 1.0, 1) < 1 / 3
    decibels = decibels - torch.where(narrow, 40.0 * outside, 0.0)
    return 10 ** (decibels.clamp(min=-60.0) / 20)


def audio_files(folder, key):
    """All wav and flac files below a folder, sorted.

    Arguments
    ---------
    folder : str or pathlib.Path
        Where to look.
    key : str
        The yaml's key, for the message.

    Returns
    -------
    list of pathlib.Path

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or no audio in it.

    Example
    -------
    >>> audio_files("nowhere", "musan_folder")
    Traceback (most recent call last):
    FileNotFoundError: musan_folder: there is no folder nowhere. Correct the \
path, or leave musan_folder empty to train without it.
    """
    folder = pathlib.Path(folder)
    hint = f"Correct the path, or leave {key} empty to train without it."
    if not folder.is_dir():
        raise FileNotFoundError(f"{key}: there is no folder {folder}. {hint}")
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in (".wav", ".flac")
    )
    if not files:
        raise FileNotFoundError(f"{key}: no wav or flac in {folder}. {hint}")
    return files


def impulse_responses(files, sample_rate, seconds=0.5, most=20000):
    """Reads impulse responses, each from its direct path on.

    Arguments
    ---------
    files : list of pathlib.Path
        Recordings; of more than `most`, an even selection.
    sample_rate : int
        In Hz.
    seconds : float
        Length kept of each.
    most : int
        How many are kept in memory, 16 kB each.

    Returns
    -------
    torch.Tensor
        Shape (n, seconds * sample_rate), float16, largest sample first and 1.

    Example
    -------
    >>> import soundfile
    >>> path = getfixture("tmp_path") / "room.wav"
    >>> soundfile.write(path, np.r_[np.zeros(50), 0.9, 0.3], 16000)
    >>> impulse_responses([path], 16000)[0, :3]
    tensor([1.0000, 0.3333, 0.0000], dtype=torch.float16)
    """
    n_samples = round(seconds * sample_rate)
    files = files[:: -(-len(files) // most)]
    rooms = torch.zeros(len(files), n_samples, dtype=torch.float16)
    for room, path in zip(rooms, tqdm(files, desc="rooms", unit="file")):
        try:
            wav = read_audio(path, 0.0, None, sample_rate)
        except BadAudio as error:
            raise BadAudio(f"impulse response {path} {error}") from error
        peak = int(wav.abs().argmax())
        if wav[peak] == 0:
            raise BadAudio(f"impulse response {path} is silent")
        wav = wav[peak : peak + n_samples] / wav[peak]
        room[: len(wav)] = wav.half()
    return rooms


def mean_square(wavs):
    """Power of each waveform, shape (batch, 1), kept off zero.

    Example
    -------
    >>> mean_square(torch.tensor([[2.0, -2.0, 2.0, -2.0]]))
    tensor([[4.]])
    """
    norm = torch.linalg.vector_norm(wavs, dim=1, keepdim=True)
    return (norm.square() / wavs.shape[1]).clamp(min=SILENCE)


def _send(values, like):
    """From the CPU to where `like` is, without waiting for the device."""
    return values.to(like.device, non_blocking=True)
