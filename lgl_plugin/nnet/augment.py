"""Augmentation of a whole batch on the model's device.

Each waveform gets its own room, channel, noise and signal-to-noise ratio. A
`Draw` holds the random choices, so that Stage I can put one augmentation on two
crops (paper, section 2.1; Huh et al. 2020). MUSAN and RIRS_NOISES are used if
their folders are given. Without them babble is made of the batch's own speech,
noise is coloured and rooms are simulated.

The CPU draws which waveforms get a room, a channel or noise, and the numbers of
the noise, and sends these draws in one copy. Rooms, channels and noise are
drawn on the device. So the CPU never waits for the device.
"""

import dataclasses
import pathlib

import scipy.fft
import torch
from speechbrain.utils.autocast import fwd_default_precision

from lgl_plugin.dataio.folder import EXTENSIONS, find_audio
from lgl_plugin.nnet.noise import (
    SNR,
    TALKERS,
    NoiseBank,
    babble,
    blanked,
    coloured_noise,
    mean_square,
    transformed,
)
from lgl_plugin.nnet.rooms import draw_channels, draw_rooms, impulse_responses
from lgl_plugin.utils.checks import check_above0


@dataclasses.dataclass
class Draw:
    """The random choices for a batch, on the device."""

    filtered: torch.Tensor  # rows with a room or a channel, int64, (n,)
    response: torch.Tensor  # of each, complex64, (n, n_fft // 2 + 1)
    n_fft: int  # length of the Fourier transform of the responses
    noisy: list[torch.Tensor]  # rows with each kind of noise, int64, (m,)
    n_talkers: list[int]  # sum over the rows of each kind
    dropped: torch.Tensor  # rows that lose a band and a stretch, int64, (m,)
    talkers: torch.Tensor  # number; 1 if not babble, int64, (batch,)
    source: torch.Tensor  # in [0, 1), picks the recording, (batch,)
    colour: torch.Tensor  # slope of coloured noise, dB per octave, (batch,)
    snr: torch.Tensor  # in dB, of the sum of all talkers, (batch,)


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
    reverb_only, noise_only, clean : float
        Probabilities of reverberation only, of noise only, and of neither. The
        rest of the waveforms get both. The paper's release has 1/4, 1/4 and 0
        in Stage I, and 1/4 each in Stage II.
    channel : float
        Probability of a random frequency response (a tilt, resonances, one in
        three a telephone band), for clean waveforms, too. The paper has none.
        It helps on a small corpus, whose sessions the encoder would otherwise
        tell apart by their channel.
    drop : float
        Probability that a band (up to 5 of 80 on the mel scale) and a stretch
        (up to 90 ms) are set to zero, as 3D-Speaker's SpecAugment does with
        features. The paper has none.
    bank_seconds : float
        Seconds of each MUSAN kind that are kept in memory, 32 kB per second.

    Raises
    ------
    FileNotFoundError
        If a given folder is missing or has no audio.
    ValueError
        If a probability is out of range, or `bank_seconds` not above 0.

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
        sample_rate: int = 16000,
        musan_folder: str | None = None,
        rir_folder: str | None = None,
        reverb_only: float = 0.25,
        noise_only: float = 0.25,
        clean: float = 0.0,
        channel: float = 0.0,
        drop: float = 0.0,
        bank_seconds: float = 3600.0,
    ):
        super().__init__()
        shares = (reverb_only, noise_only, clean)
        others = (channel, drop)
        if (
            not all(p >= 0 for p in shares)
            or sum(shares) > 1
            or not all(0 <= p <= 1 for p in others)
        ):
            raise ValueError(
                "reverb_only, noise_only, clean, channel and drop are "
                "probabilities, and the first three at most 1 in sum, got "
                f"{shares + others}"
            )
        check_above0(bank_seconds=bank_seconds)
        self.sample_rate = sample_rate
        self.reverb_only = reverb_only
        self.noise_only = noise_only
        self.clean = clean
        self.channel = channel
        self.drop = drop
        self.banks = torch.nn.ModuleDict()
        self.register_buffer("rooms", None, persistent=False)
        if musan_folder:
            for kind in SNR:
                folder = pathlib.Path(musan_folder) / kind
                files = audio_files(folder, "musan_folder")
                self.banks[kind] = NoiseBank(files, sample_rate, bank_seconds)
        if rir_folder:
            responses = [
                path
                for path in audio_files(rir_folder, "rir_folder")
                # RIRS_NOISES holds recordings of noise, too.
                if "noise" not in path.name
                and path.parts[-2] != "pointsource_noises"
            ]
            if not responses:
                raise FileNotFoundError(
                    f"rir_folder: {rir_folder} holds recordings of noise alone"
                )
            self.rooms = impulse_responses(tuple(responses), sample_rate)
        self.kinds = list(SNR) if musan_folder else ["noise", "speech"]
        self.snr_range = torch.tensor([SNR[kind] for kind in self.kinds])
        # An empty buffer moves with the module and so tells the module's
        # device.
        self.anchor: torch.Tensor
        self.register_buffer("anchor", torch.empty(0), persistent=False)

    def draw(self, n_waveforms: int, n_samples: int) -> Draw:
        """Draws the augmentation of a batch (n_waveforms, n_samples)."""
        device = self.anchor.device
        profile, channel, source, colour, drop = torch.rand(5, n_waveforms)
        # `profile` decides, in ascending order: room only, both, noise only,
        # neither.
        wet = profile < 1 - self.clean - self.noise_only
        noisy = (profile >= self.reverb_only) & (profile < 1 - self.clean)
        changed = channel < self.channel
        kind = torch.randint(len(self.kinds), (n_waveforms,))
        talkers = torch.randint(TALKERS[0], TALKERS[1] + 1, (n_waveforms,))
        talkers = talkers.where(kind == self.kinds.index("speech"), 1)
        # The range is that of one talker. Eight talkers are 9 dB louder than
        # one.
        low, high = self.snr_range[kind, :, None].unbind(1)
        snr = low + (high - low) * torch.rand(n_waveforms, TALKERS[1])
        talks = torch.arange(TALKERS[1]) < talkers[:, None]
        power = (talks * 10 ** (-snr / 10)).sum(1)
        # Rooms first, channels last, so that each is one slice of `response`.
        groups = (wet & ~changed, wet & changed, ~wet & changed)
        kinds = [noisy & (kind == i) for i in range(len(self.kinds))]
        rows = [mask.nonzero()[:, 0] for mask in (drop < self.drop, *kinds)]
        filtered = torch.cat([group.nonzero()[:, 0] for group in groups])
        numbers = (source, -9.0 + 12.0 * colour, -10 * power.log10())
        parts = [filtered, *rows, talkers, *numbers]
        # One copy of float32, which represents these whole numbers exactly.
        sent = send(torch.cat(parts), device).split([len(p) for p in parts])
        filtered, dropped, *by_kind, talkers_sent = (
            part.long() for part in sent[:-3]
        )
        source, colour, snr = sent[-3:]
        n_wet, n_changed = int(wet.sum()), int(changed.sum())
        rooms = self._draw_rooms(n_wet)
        # The transform is longer by a room, so that the room's tail does not
        # wrap round.
        n_fft = scipy.fft.next_fast_len(n_samples + rooms.shape[1], real=True)
        shape = (len(filtered), n_fft // 2 + 1)
        response = torch.empty(shape, dtype=torch.complex64, device=device)
        if n_wet:
            response[:n_wet] = transformed(torch.fft.rfft, rooms, n_fft)
        response[n_wet:] = 1.0
        if n_changed:
            response[-n_changed:] *= draw_channels(
                n_changed, shape[1], self.sample_rate, device
            )
        return Draw(
            filtered=filtered,
            response=response,
            n_fft=n_fft,
            noisy=by_kind,
            n_talkers=[int(talkers[mask].sum()) for mask in kinds],
            dropped=dropped,
            talkers=talkers_sent,
            source=source,
            colour=colour,
            snr=snr,
        )

    @fwd_default_precision
    def forward(
        self, wavs: torch.Tensor, draw: Draw | None = None
    ) -> torch.Tensor:
        """Augments a batch, shape (batch, time), in float32 under autocast too.

        Rooms, channels, sources and ratios are those of `draw`, by default a
        new one. Stretches of noise are new at each call. Each row keeps its
        loudness.
        """
        n_samples = wavs.shape[1]
        draw = draw or self.draw(*wavs.shape)
        mixed = wavs.clone()
        if len(draw.filtered):
            dry = wavs.index_select(0, draw.filtered)
            spectrum = transformed(torch.fft.rfft, dry, draw.n_fft)
            spectrum *= draw.response
            wet = transformed(torch.fft.irfft, spectrum, draw.n_fft)
            mixed.index_copy_(0, draw.filtered, wet[:, :n_samples])
        level = mean_square(mixed)
        for rows, noise in self._noises(wavs, draw):
            ratio = 10 ** (-draw.snr[rows, None] / 20)
            gain = ratio * (level[rows] / mean_square(noise)).sqrt()
            mixed.index_add_(0, rows, noise.mul_(gain))
        if len(draw.dropped):
            rows = mixed.index_select(0, draw.dropped)
            rows = blanked(rows, self.sample_rate)
            mixed.index_copy_(0, draw.dropped, rows)
        return mixed.mul_((mean_square(wavs) / mean_square(mixed)).sqrt())

    def _draw_rooms(self, n_rooms: int) -> torch.Tensor:
        """Returns room impulse responses, recorded or simulated."""
        if self.rooms is None:
            return draw_rooms(n_rooms, self.sample_rate, self.anchor.device)
        chosen = torch.randint(
            len(self.rooms), (n_rooms,), device=self.rooms.device
        )
        return self.rooms.index_select(0, chosen).float()

    def _noises(self, wavs, draw):
        """Yields the rows of each kind of noise and their noise, (n, time)."""
        n_samples = wavs.shape[1]
        for kind, rows, total in zip(self.kinds, draw.noisy, draw.n_talkers):
            if not len(rows):
                continue
            if kind in self.banks:
                chosen = draw.source[rows], draw.talkers[rows]
                noise = self.banks[kind](*chosen, total, n_samples)
            elif kind == "speech":
                noise = babble(wavs, rows, draw.talkers[rows])
            else:
                noise = coloured_noise(draw.colour[rows], n_samples)
            yield rows, noise


class NoAugmentation(torch.nn.Module):
    """Replaces an `Augmenter`: returns waveforms as they are."""

    def draw(self, *shape: int) -> None:
        """Draws nothing."""

    def forward(self, wavs: torch.Tensor, draw: None = None) -> torch.Tensor:
        """Returns waveforms as they are."""
        return wavs


def send(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies from the CPU to a device without waiting for the device."""
    # Without pinned memory a GPU's driver waits for a copy of more than 64 KB.
    values = values.pin_memory() if device.type == "cuda" else values
    return values.to(device, non_blocking=True)


def augmented(crops: torch.Tensor, augment: torch.nn.Module) -> torch.Tensor:
    """Returns two views of crops (batch, 2, samples), each augmented anew."""
    # Each view is a batch of its own: in one batch, the babble over a crop
    # could be made of the other crop of its utterance.
    return torch.stack([augment(crop) for crop in crops.unbind(1)])


def audio_files(folder: str | pathlib.Path, key: str) -> list[pathlib.Path]:
    """Returns all audio files below a folder, sorted, as training finds them.

    Raises FileNotFoundError, naming the yaml's key, if there are none.
    """
    folder = pathlib.Path(folder)
    found = find_audio(folder) if folder.is_dir() else ()
    files = [folder / name for name, problem in found if problem is None]
    if not files:
        lack = "there is no folder"
        if folder.is_dir():
            lack = f"no {', '.join(EXTENSIONS)} file in"
        raise FileNotFoundError(
            f"{key}: {lack} {folder}. Correct the path, or leave {key} empty "
            "to train without it."
        )
    return files
