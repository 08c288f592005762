"""Speaker encoders: from waveforms and lengths to embeddings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

import torch
from speechbrain.nnet.containers import LengthsCapableSequential
from torch import Tensor

from lgl_plugin.nnet.batch_norm import batch_norms
from lgl_plugin.nnet.ecapa_patches import (
    lean_pooling,
    padding_invariant,
    reflected_frames,
    relative_lengths,
)
from lgl_plugin.nnet.fbank_patches import keep_on_device

# SpeechBrain's cosine classifier, which SpeechBrain's inference classes load.
COSINE_CLASSIFIER = "!new:speechbrain.lobes.models.ECAPA_TDNN.Classifier"

Part = torch.nn.Module | Callable[[], torch.nn.Module]


class Encoder(torch.nn.Module):
    """A front end and a network: from waveforms to embeddings.

    Only `encoder(waveforms, lengths)`, `network` and `min_samples` are used by
    training, extraction and export. The state dict of `network` is the
    checkpoint that SpeechBrain loads.

    Arguments
    ---------
    features : torch.nn.Module or callable
        Maps waveforms (batch, samples) to features (batch, frames, bands), such
        as SpeechBrain's Fbank or `KaldiFbank`; without weights. Each of the
        three parts may also be a callable that makes the module (a yaml's
        `!name:`): each encoder then has its own module.
    network : torch.nn.Module or callable
        Maps features to embeddings (batch, dim) or (batch, 1, dim):
        SpeechBrain's ECAPA_TDNN, Xvector or ResNet, `CAMPPlus`, or another
        network.
    normalise : torch.nn.Module or callable, optional
        Maps features and relative lengths to features, such as SpeechBrain's
        InputNormalization; without weights.

    Attributes
    ---------
    min_samples : int
        Samples of the shortest utterance that can be embedded.
    one_by_one : bool
        True for networks whose embeddings padding would change, such as ResNet:
        each waveform of a padded batch is then embedded alone. False for
        SpeechBrain's one-dimensional networks and for those whose class has
        `masks_padding = True`. These take `lengths`, shares of the frames.

    Raises
    ------
    ValueError
        If `features` or `normalise` has weights or statistics of a corpus,
        which no checkpoint would keep.

    Example
    -------
    >>> from speechbrain.lobes.features import Fbank
    >>> from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
    >>> network = ECAPA_TDNN(80, channels=[16] * 5, lin_neurons=32)
    >>> encoder = Encoder(Fbank(n_mels=80), network).eval()
    >>> padded = torch.nn.functional.pad(torch.randn(2, 16000), (0, 800))
    >>> alone = encoder(padded[:, :16000])
    >>> alone.shape
    torch.Size([2, 32])
    >>> lengths = torch.full((2,), 16000 / 16800)
    >>> torch.allclose(encoder(padded, lengths), alone, atol=1e-4)
    True
    """

    def __init__(
        self, features: Part, network: Part, normalise: Part | None = None
    ):
        super().__init__()
        self.features = _built(features)
        keep_on_device(self.features)
        self.normalise = _built(normalise)
        self.network = _built(network)
        _refuse_weights(features=self.features, normalise=self.normalise)
        filters = getattr(self.features, "get_filter_properties", None)
        shape = None if filters is None else filters()
        self.hop = 1 if shape is None else shape.stride
        # SpeechBrain's frames are centred, the first on the first sample, so
        # they need no whole window.
        snips = getattr(self.features, "snip_edges", False)
        self.window = shape.window_size if shape and snips else 0
        # A convolution fails if it reflects more frames than the utterance has.
        frames = reflected_frames(self.network)
        for part in self.network.modules():
            if getattr(part, "masks_padding", False):
                frames = max(frames, getattr(part, "min_frames", 1) - 1)
        self.min_samples = self.window + frames * self.hop
        self.one_by_one = shape is None or not _masks_padding(self.network)
        self.frozen_statistics = self.trains_a_part = False

    def freeze_statistics(self) -> None:
        """Keeps the running statistics of batch normalisation in training.

        Otherwise statistics of augmented crops replace the running statistics
        of a network that was trained on far more speech, and suit the network
        less well. Raises ValueError if the network has no batch normalisation.
        """
        if not batch_norms(self.network):
            raise ValueError(
                "freeze_batch_statistics: the encoder has no batch "
                "normalisation, whose statistics could be kept: set it to False"
            )
        self.frozen_statistics = True

    def train_only(self, pattern: str) -> None:
        """Trains only the weights whose name matches a pattern.

        The regular expression is searched for in the names of the network's
        state dict. Batch normalisation without a trained weight keeps its
        statistics, too. Raises ValueError if no trained weight has such a name.
        """
        trained = {
            name: weight
            for name, weight in self.network.named_parameters()
            if weight.requires_grad
        }
        matching = [name for name in trained if re.search(pattern, name)]
        if not matching:
            parts = dict.fromkeys(
                ".".join(name.split(".")[:2]) for name in trained
            )
            raise ValueError(
                f"trained_weights: no weight of the encoder has {pattern!r} in "
                f"its name. Its weights are below {', '.join(parts)}."
            )
        for name, weight in trained.items():
            weight.requires_grad_(name in matching)
        self.trains_a_part = True

    def train(self, mode: bool = True) -> Encoder:
        """Sets the mode; layers that keep their statistics stay in eval."""
        super().train(mode)
        for layer in batch_norms(self.network):
            trained = any(w.requires_grad for w in layer.parameters())
            if self.frozen_statistics or self.trains_a_part and not trained:
                layer.eval()
        return self

    def forward(
        self, waveforms: Tensor, lengths: Tensor | None = None
    ) -> Tensor:
        """Embeds a batch of waveforms.

        Arguments
        ---------
        waveforms : torch.Tensor
            Shape (batch, samples), float32.
        lengths : torch.Tensor, optional
            Each waveform's own share of the samples, (batch,); the rest is
            zeros. Each embedding equals that of the waveform alone. By default
            all samples count, as for crops in training.

        Returns
        -------
        torch.Tensor
            Shape (batch, dim), float32.
        """
        if lengths is None:
            features = self.normalised(self.features(waveforms))
            with lean_pooling(self.network):
                return self.network(features).flatten(1).float()
        n_samples = (lengths * waveforms.shape[1]).round().long()
        if self.one_by_one:
            alone = zip(waveforms, n_samples.tolist())
            return torch.cat([self(wav[None, :size]) for wav, size in alone])
        n_frames = 1 + (n_samples - self.window) // self.hop
        with (
            padding_invariant(self.features, self.network, n_frames),
            lean_pooling(self.network),
        ):
            features = self.features(waveforms)
            lengths = relative_lengths(n_frames, features.shape[1])
            features = self.normalised(features, lengths)
            return self.network(features, lengths).flatten(1).float()

    def normalised(
        self, features: Tensor, lengths: Tensor | None = None
    ) -> Tensor:
        """Normalises features (batch, frames, bands) over each utterance.

        `lengths` (batch,) are shares of the frames; without them all frames
        count.
        """
        if self.normalise is None:
            return features
        if lengths is None:
            lengths = torch.ones(len(features), device=features.device)
        return self.normalise(features, lengths)


def restricted(
    encoder: Encoder, freeze_statistics: bool, trained_weights: str | None
) -> Encoder:
    """Applies the settings freeze_batch_statistics and trained_weights.

    Every encoder that Stage II trains must pass through this function.
    """
    if freeze_statistics:
        encoder.freeze_statistics()
    if trained_weights:
        encoder.train_only(trained_weights)
    return encoder


class LogMelStatistics(torch.nn.Module):
    """A network without weights: means and deviations of log-mel bands.

    After whitening (`lgl_plugin.inference.backends.Whitening`) this is the
    baseline that any training must beat.

    Example
    -------
    >>> LogMelStatistics()(torch.randn(2, 50, 80), torch.ones(2)).shape
    torch.Size([2, 1, 160])
    """

    masks_padding = True

    def forward(
        self, features: Tensor, lengths: Tensor | None = None
    ) -> Tensor:
        """Turns features (batch, frames, bands) into (batch, 1, 2 * bands).

        `lengths` (batch,) is each utterance's share of the frames. Without
        `lengths` all frames count.
        """
        frames = features.shape[1]
        if lengths is None:
            lengths = torch.ones(len(features), device=features.device)
        # SpeechBrain rounds a number of frames up. Without the margin, a float
        # error would add one frame of padding.
        counted = (lengths * frames - 1e-3).ceil().clamp(min=1)[:, None, None]
        place = torch.arange(frames, device=features.device)[None, :, None]
        weight = (place < counted) / counted
        mean = (features * weight).sum(1)
        variance = ((features - mean[:, None]).square() * weight).sum(1)
        deviation = variance.clamp(min=1e-10).sqrt()
        return torch.cat([mean, deviation], dim=1)[:, None]


def _masks_padding(network):
    """Returns True if a network that is given lengths ignores padding."""
    parts = list(network.modules())
    if any(getattr(part, "masks_padding", False) for part in parts):
        return True
    if isinstance(network, LengthsCapableSequential):
        # The container passes lengths on to those of its layers that take them.
        return _masks_padding(next(iter(network.values())))
    # A network of another package may take lengths and not mask padding.
    # SpeechBrain's ResNet, its network with two-dimensional convolutions,
    # ignores lengths.
    return "lengths" in inspect.signature(network.forward).parameters and all(
        type(part).__module__.startswith(("speechbrain.", "torch."))
        and not isinstance(part, torch.nn.Conv2d)
        for part in parts
    )


def _refuse_weights(**parts):
    """Raises ValueError if a part that no checkpoint contains has weights."""
    for name, part in parts.items():
        if part is None:
            continue
        kind = getattr(part, "norm_type", None)
        if next(part.parameters(), None) is not None:
            found = "has weights"
        elif kind in ("global", "speaker"):
            found = f"has statistics of a corpus (norm_type: {kind})"
        else:
            continue
        raise ValueError(
            f"the encoder's {name}, {type(part).__name__}, {found}, but only "
            "the network's weights are trained, loaded and kept: make it "
            "part of the network, or take another without"
        )


def _built(part):
    """Returns `part`, or calls it if it is a callable that makes the module."""
    if part is None or isinstance(part, torch.nn.Module):
        return part
    return part()
