"""Encoders: waveforms and lengths in, embeddings out."""

import torch
from speechbrain.utils.logger import get_logger

logger = get_logger(__name__)


class LogMelStatistics(torch.nn.Module):
    """Mean and deviation of the log-mel bands: the floor, with no network.

    Takes the place of an encoder in `Extractor`; see `whiten`.

    Example
    -------
    >>> LogMelStatistics()(torch.randn(2, 50, 80), torch.ones(2)).shape
    torch.Size([2, 1, 160])
    """

    def forward(self, features, lengths):
        """Summarises features.

        Arguments
        ---------
        features : torch.Tensor
            Shape (batch, frames, bands).
        lengths : torch.Tensor
            Share of the frames that belong to each utterance, (batch,).

        Returns
        -------
        torch.Tensor
            Shape (batch, 1, 2 * bands).
        """
        frames = features.shape[1]
        # As SpeechBrain counts a frame that is begun.
        counted = (lengths * frames - 1e-3).ceil().clamp(min=1)[:, None, None]
        place = torch.arange(frames, device=features.device)[None, :, None]
        weight = (place < counted) / counted
        mean = (features * weight).sum(1)
        variance = ((features - mean[:, None]).square() * weight).sum(1)
        deviation = variance.clamp(min=1e-10).sqrt()
        return torch.cat([mean, deviation], dim=1)[:, None]
