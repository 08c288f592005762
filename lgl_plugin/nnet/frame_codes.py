"""Quantisers of frames, whose codes are the targets of masked prediction."""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.fft import dct
from torch import Tensor

from lgl_plugin.clustering.kmeans import FaissKMeans

Maker = Callable[[], torch.nn.Module]


class KMeansQuantiser(torch.nn.Module):
    """Codes of frames by this package's k-means: HuBERT's targets.

    Arguments
    ---------
    transform : callable
        Makes a module that maps frames (batch, time, features) to (batch, time,
        size). Its output, less its mean, is clustered: `Cepstra`, `ModelLayer`,
        or `torch.nn.Identity` for the frames themselves.
    size : int
        Dimensions of the transform's output.
    cb_vocab : int
        Number of codes.

    Example
    -------
    >>> quantiser = KMeansQuantiser(Cepstra, size=26, cb_vocab=5)
    >>> crops = torch.randn(10, 20, 160)
    >>> quantiser.fit(crops)
    >>> quantiser(crops).shape
    torch.Size([10, 20])
    """

    def __init__(self, transform: Maker, size: int, cb_vocab: int = 100):
        super().__init__()
        self.transform = transform()
        self.cb_vocab = cb_vocab
        self.mean = torch.nn.Buffer(torch.zeros(size))
        self.centroids = torch.nn.Buffer(torch.zeros(cb_vocab, size))

    def fit(self, crops: Tensor) -> None:
        """Finds the centroids on crops (n, time, features).

        ValueError if there are fewer frames than codes.
        """
        points = self.transform(crops).flatten(0, 1)
        self.mean.copy_(points.mean(0))
        cluster = FaissKMeans(self.cb_vocab)
        centroids = cluster((points - self.mean).cpu().numpy()).centroids
        # k-means drops clusters without a member: their codes stay unused.
        self.centroids.zero_()
        self.centroids[: len(centroids)] = torch.from_numpy(centroids)

    def forward(self, frames: Tensor) -> Tensor:
        """Returns the code of the nearest centroid by cosine."""
        points = self.transform(frames) - self.mean
        products = points @ self.centroids.T
        # An unused code's centroid is zero, and would win if all other products
        # were negative.
        unused = ~self.centroids.any(-1)
        return products.masked_fill(unused, -torch.inf).argmax(-1)


class Cepstra(torch.nn.Module):
    """13 mel-frequency cepstral coefficients of each stacked frame of 80 bands.

    Example
    -------
    >>> Cepstra()(torch.randn(2, 50, 160)).shape
    torch.Size([2, 50, 26])
    """

    def __init__(self):
        super().__init__()
        rows = dct(torch.eye(80).numpy(), norm="ortho")[:, :13]
        self.rows = torch.nn.Buffer(torch.from_numpy(rows), persistent=False)

    def forward(self, frames: Tensor) -> Tensor:
        """Transforms (batch, time, k * 80) to (batch, time, k * 13)."""
        stacked = frames.unflatten(-1, (-1, 80))
        return (stacked @ self.rows).flatten(-2)


class ModelLayer(torch.nn.Module):
    """Hidden states of a layer of a model that was pre-trained before.

    HuBERT's second iteration uses clusters of these states as targets.

    Arguments
    ---------
    source : str
        Folder of a transformers w2v-BERT model, such as pretrain.py writes.
    layer : int
        Number of the layer; 0 for the input of the first layer.

    Example
    -------
    >>> from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel
    >>> config = Wav2Vec2BertConfig(
    ...     hidden_size=8, num_hidden_layers=1, num_attention_heads=2
    ... )
    >>> folder = getfixture("tmp_path")
    >>> Wav2Vec2BertModel(config).save_pretrained(folder)
    >>> ModelLayer(folder, 1)(torch.randn(2, 50, 160)).shape
    torch.Size([2, 50, 8])
    """

    def __init__(self, source: str, layer: int):
        from transformers import Wav2Vec2BertModel  # needs the extra [ssl]

        super().__init__()
        self.layer = layer
        self.model = Wav2Vec2BertModel.from_pretrained(source)
        self.model.requires_grad_(False)

    def train(self, mode: bool = True) -> ModelLayer:
        """Stays in eval mode: dropout would change the targets at each step."""
        return super().train(False)

    def forward(self, frames: Tensor) -> Tensor:
        """Transforms (batch, time, features) to (batch, time, size)."""
        with torch.no_grad():
            states = self.model(frames, output_hidden_states=True).hidden_states
        return states[self.layer]
