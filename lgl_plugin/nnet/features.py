"""Inputs of networks: Kaldi's log-mel features, or raw samples."""

import torch
from speechbrain.dataio.dataio import length_to_mask
from speechbrain.utils.autocast import fwd_default_precision
from speechbrain.utils.filter_analysis import FilterProperties
from torch import Tensor
from torchaudio.compliance.kaldi import get_mel_banks


class Waveform(torch.nn.Module):
    """Raw samples, for networks whose input is the waveform.

    Example
    -------
    >>> Waveform()(torch.zeros(2, 16000)).shape
    torch.Size([2, 16000])
    """

    snip_edges = True

    def get_filter_properties(self) -> FilterProperties:
        """Returns a window and a stride of one sample."""
        return FilterProperties(1, 1)

    def forward(self, waveforms: Tensor) -> Tensor:
        """Returns waveforms as they are."""
        return waveforms


class KaldiFbank(torch.nn.Module):
    """Kaldi's log-mel features of a whole batch, without dither.

    Frames of 25 ms, every 10 ms, lie within the waveform (`snip_edges`). Each
    frame is reduced by its mean, pre-emphasised by 0.97 and weighted by Povey's
    window. The result equals that of `torchaudio.compliance.kaldi.fbank` on
    each waveform.

    Arguments
    ---------
    n_mels : int
        Number of bands, from 20 Hz to half the sampling rate.
    sample_rate : int
        Sampling rate in Hz.

    Example
    -------
    >>> KaldiFbank()(torch.randn(2, 16000)).shape
    torch.Size([2, 98, 80])
    """

    snip_edges = True  # SpeechBrain's frames are centred instead

    def __init__(self, n_mels: int = 80, sample_rate: int = 16000):
        super().__init__()
        self.window_size = sample_rate * 25 // 1000
        self.stride = sample_rate * 10 // 1000
        self.n_fft = 1 << (self.window_size - 1).bit_length()
        mel = (n_mels, self.n_fft, sample_rate, 20.0, 0.0, 100.0, -500.0, 1.0)
        banks, _ = get_mel_banks(*mel)
        banks = torch.nn.functional.pad(banks.T, (0, 0, 0, 1))
        window = torch.hann_window(self.window_size, periodic=False) ** 0.85
        self.window = torch.nn.Buffer(window, persistent=False)
        self.banks = torch.nn.Buffer(banks, persistent=False)

    def get_filter_properties(self) -> FilterProperties:
        """Returns window and stride of the frames, in samples."""
        return FilterProperties(self.window_size, self.stride)

    @fwd_default_precision(cast_inputs=torch.float32)
    def forward(self, waveforms: Tensor) -> Tensor:
        """Turns waveforms (batch, samples) into (batch, frames, bands).

        The result is float32, under autocast too. Raises RuntimeError if the
        waveforms are shorter than a frame.
        """
        frames = waveforms.unfold(1, self.window_size, self.stride)
        power = self.spectrum(frames).abs().square()
        return self.logarithm(power)

    def spectrum(self, frames: Tensor) -> Tensor:
        """Turns frames (..., window_size) into spectra, a linear map."""
        frames = frames - frames.mean(dim=-1, keepdim=True)
        before = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
        frames = (frames - 0.97 * before) * self.window
        return torch.fft.rfft(frames, self.n_fft)

    def logarithm(self, power: Tensor) -> Tensor:
        """Turns power spectra into logarithms of bands."""
        floor = torch.finfo(torch.float32).eps
        return (power @ self.banks).clamp(min=floor).log()


def model_inputs(log_mels: Tensor, n_frames: Tensor | None = None) -> Tensor:
    """Turns log-mel frames into inputs of transformers' w2v-BERT models.

    Each band gets mean 0 and variance 1 over the utterance. Two frames are
    stacked to one, so there are 50 per second. transformers'
    SeamlessM4TFeatureExtractor does the same with a waveform.

    Arguments
    ---------
    log_mels : torch.Tensor
        Shape (batch, time, 80).
    n_frames : torch.Tensor, optional
        Frames of each utterance, int64 (batch,); all if not given.

    Returns
    -------
    torch.Tensor
        Shape (batch, time // 2, 160).

    Example
    -------
    >>> model_inputs(torch.randn(2, 201, 80)).shape
    torch.Size([2, 100, 160])
    """
    x = normalised(log_mels, n_frames, 1)
    return x[:, : x.shape[1] // 2 * 2].unflatten(1, (-1, 2)).flatten(2)


def normalised(
    x: Tensor, n_frames: Tensor | None, ddof: int, eps: float = 1e-7
) -> Tensor:
    """Normalises x (batch, frames, bands) to mean 0, deviation 1 over frames.

    Only each utterance's own frames count; later frames become 0.
    """
    if n_frames is None:
        mean = x.mean(1, keepdim=True)
        variance = x.var(1, keepdim=True, correction=ddof)
        return (x - mean) / (variance + eps).sqrt()
    is_own = length_to_mask(n_frames, x.shape[1]).bool()[..., None]
    n = n_frames[:, None, None]
    mean = (x * is_own).sum(1, keepdim=True) / n
    x = (x - mean) * is_own
    variance = x.square().sum(1, keepdim=True) / (n - ddof)
    return x / (variance + eps).sqrt()
