"""Heads of pre-trained speech models: from all layers' states to embeddings.

A head takes states (layers, batch, frames, width), float32, and the number of
frames of each utterance, int64 (batch,), or None if all frames count. Frames
after an utterance's end change nothing. Embeddings are (batch, embedding_size).
"""

import torch
from speechbrain.dataio.dataio import length_to_mask
from speechbrain.lobes.models.ECAPA_TDNN import (
    ECAPA_TDNN,
    AttentiveStatisticsPooling,
)
from torch import Tensor

from lgl_plugin.nnet.ecapa_patches import (
    padding_invariant,
    reflected_frames,
    relative_lengths,
)


class WeightedECAPA(torch.nn.Module):
    """An ECAPA-TDNN on a weighted sum of all layers, less its mean over time.

    Chen et al., "Large-scale self-supervised speech representation learning for
    automatic speaker verification", ICASSP 2022.

    Arguments
    ---------
    n_states, width : int
        Number of states of the speech model, one more than its layers, and
        their dimensions.
    embedding_size : int
        Dimensions of the embedding.
    channels : list of int
        Channels of the ECAPA-TDNN's blocks.
    attention_channels : int
        Channels of the attention of the ECAPA-TDNN's pooling.

    Example
    -------
    >>> head = WeightedECAPA(3, 16, 32, channels=[8, 8, 8, 8, 24])
    >>> head(torch.randn(3, 2, 50, 16)).shape
    torch.Size([2, 32])
    """

    def __init__(
        self,
        n_states: int,
        width: int,
        embedding_size: int = 192,
        channels: list[int] | tuple[int, ...] = (512, 512, 512, 512, 1536),
        attention_channels: int = 128,
    ):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.zeros(n_states))
        self.ecapa = ECAPA_TDNN(
            width,
            channels=[*channels],
            attention_channels=attention_channels,
            lin_neurons=embedding_size,
        )
        self.min_frames = 1 + reflected_frames(self.ecapa)

    def forward(self, states: Tensor, n_frames: Tensor | None = None) -> Tensor:
        """Returns embeddings."""
        x = _weighted(states, self.weights)
        if n_frames is None:
            return self.ecapa(x - x.mean(1, keepdim=True))[:, 0]
        is_own = length_to_mask(n_frames, x.shape[1]).bool()[..., None]
        x = x - (x * is_own).sum(1, keepdim=True) / n_frames[:, None, None]
        with padding_invariant(torch.nn.Identity(), self.ecapa, n_frames):
            lengths = relative_lengths(n_frames, x.shape[1])
            return self.ecapa(x, lengths)[:, 0]


class MHFA(torch.nn.Module):
    """Multi-head factorised attentive pooling.

    Peng et al., "An attention-based backend allowing efficient fine-tuning of
    transformer models for speaker verification", SLT 2022. The attention's keys
    are one weighted sum of the layers, its values another.

    Arguments
    ---------
    n_states, width : int
        Number of states of the speech model, one more than its layers, and
        their dimensions.
    embedding_size : int
        Dimensions of the embedding.
    heads : int
        Number of attention heads.
    inside : int
        Dimensions of keys and values.

    Example
    -------
    >>> MHFA(3, 16, 32, heads=4)(torch.randn(3, 2, 50, 16)).shape
    torch.Size([2, 32])
    """

    min_frames = 1

    def __init__(
        self,
        n_states: int,
        width: int,
        embedding_size: int = 256,
        heads: int = 64,
        inside: int = 128,
    ):
        super().__init__()
        self.key_weights = torch.nn.Parameter(torch.ones(n_states))
        self.value_weights = torch.nn.Parameter(torch.ones(n_states))
        self.key = torch.nn.Linear(width, inside)
        self.value = torch.nn.Linear(width, inside)
        self.attention = torch.nn.Linear(inside, heads)
        self.embedding = torch.nn.Linear(heads * inside, embedding_size)

    def forward(self, states: Tensor, n_frames: Tensor | None = None) -> Tensor:
        """Returns embeddings."""
        keys = self.key(_weighted(states, self.key_weights))
        values = self.value(_weighted(states, self.value_weights))
        scores = self.attention(keys).float()
        if n_frames is not None:
            is_own = length_to_mask(n_frames, scores.shape[1]).bool()[..., None]
            scores = scores.masked_fill(~is_own, -torch.inf)
        pooled = scores.softmax(1).transpose(1, 2) @ values.float()
        return self.embedding(pooled.flatten(1))


class LayerAdapters(torch.nn.Module):
    """An adapter for each layer, concatenated, and attentive statistics.

    Li et al., "Enhancing speaker verification with w2v-BERT 2.0 and knowledge
    distillation guided structured pruning", 2025.

    Arguments
    ---------
    n_states, width : int
        Number of states of the speech model, one more than its layers, and
        their dimensions.
    embedding_size : int
        Dimensions of the embedding.
    inside : int
        Dimensions of each adapter's output.
    attention_channels : int
        Channels of the pooling's attention.

    Example
    -------
    >>> head = LayerAdapters(3, 16, 32, inside=8, attention_channels=8)
    >>> head(torch.randn(3, 2, 50, 16)).shape
    torch.Size([2, 32])
    """

    min_frames = 2  # a deviation needs two

    def __init__(
        self,
        n_states: int,
        width: int,
        embedding_size: int = 256,
        inside: int = 128,
        attention_channels: int = 128,
    ):
        super().__init__()
        self.adapters = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.Linear(width, inside),
                torch.nn.LayerNorm(inside),
                torch.nn.ReLU(),
                torch.nn.Linear(inside, inside),
            )
            for _ in range(n_states)
        )
        self.pool = AttentiveStatisticsPooling(
            n_states * inside, attention_channels
        )
        self.embedding = torch.nn.Linear(2 * n_states * inside, embedding_size)

    def forward(self, states: Tensor, n_frames: Tensor | None = None) -> Tensor:
        """Returns embeddings."""
        each = [adapter(x) for adapter, x in zip(self.adapters, states)]
        x = torch.cat(each, dim=2).transpose(1, 2)
        lengths = None
        if n_frames is not None:
            lengths = relative_lengths(n_frames, x.shape[2])
        return self.embedding(self.pool(x, lengths)[..., 0])


def _weighted(states, weights):
    """Returns the sum of the layers, weighted by the softmax of `weights`."""
    return torch.einsum("s,sbtc->btc", weights.softmax(0), states)
