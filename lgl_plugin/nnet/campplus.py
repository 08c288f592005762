"""CAM++, a densely connected TDNN with context-aware masking.

Wang et al., "CAM++: A Fast and Efficient Network for Speaker Verification Using
Context-Aware Masking", Interspeech 2023. Parts have 3D-Speaker's names, so that
its public weights load.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, relu

# Number of layers, and dilation, of each dense block.
BLOCKS = ((12, 1), (24, 2), (16, 2))
# Frames of a segment. A frame's context is the mean of its segment plus that of
# the utterance.
SEGMENT = 100


class CAMPPlus(torch.nn.Module):
    """The CAM++ network; padding does not change its embeddings.

    Arguments
    ---------
    feat_dim : int
        Bands of the features, a multiple of 8.
    embedding_size : int
        Dimensions of the embedding.
    growth_rate : int
        Channels that a layer of a dense block adds.
    bn_size : int
        Channels within a layer, as a multiple of `growth_rate`.
    init_channels : int
        Channels before the first dense block.

    Example
    -------
    >>> network = CAMPPlus(80, 192, growth_rate=8, init_channels=16).eval()
    >>> network(torch.randn(2, 200, 80)).shape
    torch.Size([2, 1, 192])
    """

    masks_padding = True
    min_frames = 3  # two after the stride, as a deviation needs

    def __init__(
        self,
        feat_dim: int = 80,
        embedding_size: int = 192,
        growth_rate: int = 32,
        bn_size: int = 4,
        init_channels: int = 128,
    ):
        super().__init__()
        self.head = _Head()
        channels = init_channels
        parts: dict[str, torch.nn.Module] = {
            "tdnn": _Entry(32 * feat_dim // 8, channels)
        }
        for number, (n_layers, dilation) in enumerate(BLOCKS, 1):
            parts[f"block{number}"] = _DenseBlock(
                n_layers, channels, growth_rate, bn_size, dilation
            )
            channels += n_layers * growth_rate
            parts[f"transit{number}"] = _Transit(channels)
            channels //= 2
        parts["out_nonlinear"] = _Activation(channels)
        parts["dense"] = _Dense(2 * channels, embedding_size)
        self.xvector = torch.nn.ModuleDict(parts)
        for module in self.modules():
            if isinstance(module, torch.nn.Conv1d):
                torch.nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    torch.nn.init.zeros_(module.bias)

    def forward(
        self, features: Tensor, lengths: Tensor | None = None
    ) -> Tensor:
        """Embeds features (batch, frames, bands) as (batch, 1, dim).

        `lengths` (batch,) is each utterance's share of the frames, at least
        three frames. Without `lengths` all frames count.
        """
        x, mask = features.transpose(1, 2), None
        if lengths is not None:
            place = torch.arange(x.shape[2], device=x.device)
            mask = place < (lengths * x.shape[2])[:, None]
            mask = mask[:, None].to(x.dtype)
        x = self.head(x, mask)
        for name, part in self.xvector.items():
            if name == "dense":
                break
            x = part(x, mask)
            if name == "tdnn" and mask is not None:
                mask = mask[..., ::2]
        return self.xvector["dense"](_statistics(x, mask))[:, None]


class _ResidualBlock(torch.nn.Module):
    """Two convolutions over bands and frames, with a shortcut."""

    def __init__(self, channels, stride):
        super().__init__()
        self.conv1 = _conv2d(channels, channels, stride)
        self.bn1 = torch.nn.BatchNorm2d(channels)
        self.conv2 = _conv2d(channels, channels)
        self.bn2 = torch.nn.BatchNorm2d(channels)
        self.shortcut = torch.nn.Sequential()
        if stride > 1:
            self.shortcut = torch.nn.Sequential(
                torch.nn.Conv2d(
                    *(channels, channels, 1), stride=(stride, 1), bias=False
                ),
                torch.nn.BatchNorm2d(channels),
            )

    def forward(self, x, mask):
        hidden = relu(self.bn1(self.conv1(_masked(x, mask))))
        hidden = self.bn2(self.conv2(_masked(hidden, mask)))
        return relu(hidden + self.shortcut(x))


class _Head(torch.nn.Module):
    """The two-dimensional front: 32 channels, an eighth of the bands."""

    def __init__(self):
        super().__init__()
        channels = 32
        self.conv1 = _conv2d(1, channels)
        self.bn1 = torch.nn.BatchNorm2d(channels)
        for name in ("layer1", "layer2"):
            blocks = (_ResidualBlock(channels, stride) for stride in (2, 1))
            setattr(self, name, torch.nn.ModuleList(blocks))
        self.conv2 = _conv2d(channels, channels, stride=2)
        self.bn2 = torch.nn.BatchNorm2d(channels)

    def forward(self, x, mask):
        if mask is not None:
            mask = mask[:, None]
        x = relu(self.bn1(self.conv1(_masked(x[:, None], mask))))
        for block in (*self.layer1, *self.layer2):
            x = block(x, mask)
        return relu(self.bn2(self.conv2(_masked(x, mask)))).flatten(1, 2)


class _Activation(torch.nn.Module):
    """Batch normalisation and ReLU."""

    def __init__(self, channels):
        super().__init__()
        self.batchnorm = torch.nn.BatchNorm1d(channels)

    def forward(self, x, mask=None):
        return relu(self.batchnorm(x))


class _Entry(torch.nn.Module):
    """The convolution that keeps every second frame."""

    def __init__(self, channels, channels_after):
        super().__init__()
        self.linear = torch.nn.Conv1d(
            *(channels, channels_after, 5), stride=2, padding=2, bias=False
        )
        self.nonlinear = _Activation(channels_after)

    def forward(self, x, mask):
        return self.nonlinear(self.linear(_masked(x, mask)))


class _ContextMask(torch.nn.Module):
    """A convolution, weighted by the context of utterance and segment."""

    def __init__(self, channels, growth, dilation):
        super().__init__()
        self.linear_local = torch.nn.Conv1d(
            *(channels, growth, 3),
            padding=dilation,
            dilation=dilation,
            bias=False,
        )
        self.linear1 = torch.nn.Conv1d(channels, channels // 2, 1)
        self.linear2 = torch.nn.Conv1d(channels // 2, growth, 1)

    def forward(self, x, mask):
        x = _masked(x, mask)
        context = _mean(x, mask) + _segment_means(x, mask)
        weight = self.linear2(relu(self.linear1(context))).sigmoid()
        return self.linear_local(x) * weight


class _DenseLayer(torch.nn.Module):
    """A layer of a dense block: from all channels to `growth` new ones."""

    def __init__(self, channels, growth, bn_size, dilation):
        super().__init__()
        inside = bn_size * growth
        self.nonlinear1 = _Activation(channels)
        self.linear1 = torch.nn.Conv1d(channels, inside, 1, bias=False)
        self.nonlinear2 = _Activation(inside)
        self.cam_layer = _ContextMask(inside, growth, dilation)

    def forward(self, x, mask):
        x = self.nonlinear2(self.linear1(self.nonlinear1(x)))
        return self.cam_layer(x, mask)


class _DenseBlock(torch.nn.ModuleDict):
    """Layers that each append channels to their input."""

    def __init__(self, n_layers, channels, growth, bn_size, dilation):
        super().__init__(
            {
                f"tdnnd{n + 1}": _DenseLayer(
                    channels + n * growth, growth, bn_size, dilation
                )
                for n in range(n_layers)
            }
        )

    def forward(self, x, mask):
        for layer in self.values():
            x = torch.cat([x, layer(x, mask)], dim=1)
        return x


class _Transit(torch.nn.Module):
    """Halves the number of channels between two blocks."""

    def __init__(self, channels):
        super().__init__()
        self.nonlinear = _Activation(channels)
        self.linear = torch.nn.Conv1d(channels, channels // 2, 1, bias=False)

    def forward(self, x, mask):
        return self.linear(self.nonlinear(x))


class _Dense(torch.nn.Module):
    """Maps statistics to the embedding, with batch normalisation."""

    def __init__(self, channels, embedding_size):
        super().__init__()
        self.linear = torch.nn.Conv1d(channels, embedding_size, 1, bias=False)
        self.nonlinear = torch.nn.ModuleDict(
            {"batchnorm": torch.nn.BatchNorm1d(embedding_size, affine=False)}
        )

    def forward(self, x):
        return self.nonlinear["batchnorm"](self.linear(x[..., None])[..., 0])


def _conv2d(channels, channels_after, stride=1):
    """Makes a 3 x 3 convolution with a stride over bands."""
    return torch.nn.Conv2d(
        *(channels, channels_after, 3),
        stride=(stride, 1),
        padding=1,
        bias=False,
    )


def _masked(x, mask):
    """Sets padding to zero, which a convolution would mix with speech."""
    return x if mask is None else x * mask


def _mean(x, mask):
    """Returns the mean over time (batch, channels, 1) of a masked x."""
    if mask is None:
        return x.mean(dim=2, keepdim=True)
    return x.sum(dim=2, keepdim=True) / mask.sum(dim=2, keepdim=True)


def _segment_means(x, mask):
    """Returns, for each frame, the mean over its segment of a masked x."""
    frames = x.shape[2]
    counted = torch.ones_like(x[:1, :1]) if mask is None else mask
    whole = (frames + SEGMENT - 1) // SEGMENT * SEGMENT
    # ONNX export would fix a padding that depends on the length.
    sums, counts = (
        pad(part, (0, SEGMENT))[..., :whole].unflatten(2, (-1, SEGMENT)).sum(3)
        for part in (x, counted)
    )
    means = (sums / counts.clamp(min=1))[..., None]
    return means.expand(-1, -1, -1, SEGMENT).flatten(2)[..., :frames]


def _statistics(x, mask):
    """Returns means and deviations over time, (batch, 2 * channels)."""
    if mask is None:
        deviation, mean = torch.std_mean(x, dim=2)
        return torch.cat([mean, deviation], dim=1)
    counts = mask.sum(dim=2)
    mean = (x * mask).sum(dim=2) / counts
    squares = (x - mean[..., None]).square() * mask
    deviation = (squares.sum(dim=2) / (counts - 1)).sqrt()
    return torch.cat([mean, deviation], dim=1)
