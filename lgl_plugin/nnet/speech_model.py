"""Pre-trained speech models, such as WavLM, as a speaker network.

The models are transformers' own classes, not SpeechBrain's wrappers of them.
The wrappers have five faults here. They activate the dropout of a frozen model
in training. They normalise a waveform together with its padding. They let
padding into group normalisation and into weighted sums. They compute w2v-BERT's
features in numpy. They need the model's folder wherever its weights are loaded.
SpeechBrain's LoRA replaces linear layers, but WavLM reads the weights of some
layers without calling them.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable
from typing import Any

import torch
from speechbrain.dataio.dataio import length_to_mask
from torch import Tensor

from lgl_plugin.nnet.features import KaldiFbank, model_inputs, normalised
from lgl_plugin.nnet.speech_source import (
    read_config,
    read_model,
    read_sample_rate,
)

# Layers whose weights LoRA changes: queries and values, by each family's names.
LORA = ("q_proj", "v_proj", "linear_q", "linear_v")
TRAINED = ("head", "layers", "lora")


class SpeechModel(torch.nn.Module):
    """WavLM, HuBERT, wav2vec 2.0 or w2v-BERT 2.0, and a head for speakers.

    This is the network of an `Encoder` whose features are `Waveform`. The head
    takes the states of all layers. Padding changes no embedding. The
    convolutions, projections and positional embeddings below the transformer's
    layers are never trained. A frozen model runs without dropout and masking.

    Arguments
    ---------
    source : str or dict
        A folder that `save_pretrained` wrote, or a name at Hugging Face. A dict
        is the configuration itself: the model then has random weights, which
        those of an exported folder replace.
    head : callable
        Takes `n_states` and `width`, and returns a head of
        `lgl_plugin.nnet.speech_heads`.
    train : str
        The part that is trained: "head" freezes the speech model; "layers"
        trains its transformer, too; "lora" adds products of thin matrices to
        the weights of queries and values (Hu et al. 2022).
    lr_scale : float
        The learning rate of the topmost layer, as a share of the head's.
    decay : float
        Learning rate of each layer, as a share of that of the layer above.
    rank : int
        Rank of LoRA's matrices; their product is multiplied by 2.
    normalise : bool, optional
        True: a waveform is normalised to mean 0 and deviation 1 first. The
        default is the value in the source's preprocessor_config.json, or False
        without that file. w2v-BERT's features are the same either way.

    Raises
    ------
    ValueError
        If transformers is not installed, the source is no such model or lacks
        weights, or an argument would have no effect.

    Example
    -------
    >>> import functools
    >>> from lgl_plugin.nnet.encoders import Encoder
    >>> from lgl_plugin.nnet.features import Waveform
    >>> from lgl_plugin.nnet.speech_heads import MHFA
    >>> tiny = {
    ...     "model_type": "wavlm",
    ...     "hidden_size": 16,
    ...     "num_hidden_layers": 2,
    ...     "num_attention_heads": 2,
    ...     "intermediate_size": 16,
    ...     "conv_dim": [8] * 7,
    ...     "num_conv_pos_embeddings": 4,
    ...     "num_conv_pos_embedding_groups": 2,
    ... }
    >>> head = functools.partial(MHFA, embedding_size=32, heads=4)
    >>> encoder = Encoder(Waveform, SpeechModel(tiny, head)).eval()
    >>> encoder(torch.randn(2, 16000)).shape, encoder.min_samples
    (torch.Size([2, 32]), 400)
    """

    masks_padding = True
    pretrained = "front."  # prefix of the weights that an anchor penalises

    def __init__(
        self,
        source: str | dict,
        head: Callable[..., torch.nn.Module],
        train: str = "head",
        lr_scale: float = 1.0,
        decay: float = 1.0,
        rank: int = 0,
        normalise: bool | None = None,
    ):
        super().__init__()
        self.check_arguments(source, head, train, lr_scale, decay, rank)
        self.front, source_normalises = read_model(source)
        self.normalise = source_normalises if normalise is None else normalise
        self.is_frozen = train == "head"
        self.lr_scale, self.decay = lr_scale, decay
        self.front.requires_grad_(False)
        layers = self.front.encoder.layers
        if train == "layers":
            layers.requires_grad_(True)
        for name, part in layers.named_modules():
            if train == "lora" and name.endswith(LORA):
                torch.nn.utils.parametrize.register_parametrization(
                    part, "weight", _LowRank(part.weight, rank)
                )
        config = self.front.config
        # SpecAugment and layerdrop draw by numpy, differently in each process.
        config.apply_spec_augment, config.layerdrop = False, 0.0
        is_bert = config.model_type == "wav2vec2-bert"
        if not is_bert:  # no gradient through the frozen convolutions
            self.front.feature_extractor._freeze_parameters()
        self.fbank = KaldiFbank() if is_bert else None
        self.head = head(
            n_states=config.num_hidden_layers + 1, width=config.hidden_size
        )
        # In samples, which are the frames of this network's input.
        self.min_frames = self._samples_of(self.head.min_frames)
        self.train()

    @staticmethod
    def check_arguments(
        source: str | dict,
        head: object = None,
        train: str = "head",
        lr_scale: float = 1.0,
        decay: float = 1.0,
        rank: int = 0,
        normalise: bool | None = None,
    ) -> None:
        """Refuses contradictory arguments; reads the configuration only."""
        if train not in TRAINED:
            raise ValueError(f"train: {train} is none of {', '.join(TRAINED)}")
        if not (0 < lr_scale <= 1 and 0 < decay <= 1):
            raise ValueError("lr_scale and decay should be above 0, at most 1")
        if train == "head" and (lr_scale, decay) != (1.0, 1.0):
            raise ValueError(
                "lr_scale and decay change nothing where train: head leaves "
                "the speech model as it is"
            )
        if (train == "lora") != (rank > 0):
            raise ValueError("rank: it must be above 0 for train: lora, else 0")
        read_config(source)

    @staticmethod
    def check_sample_rate(rate: int, source: str | dict, **_: Any) -> None:
        """Refuses waveforms of another sampling rate than the model's."""
        own = read_sample_rate(source)
        if rate != own:
            raise ValueError(
                f"sample_rate: {rate} is not the {own} Hz of "
                f"{source}: set it to {own}"
            )

    def train(self, mode: bool = True) -> SpeechModel:
        """Sets the mode of trained parts; a frozen model stays in eval mode."""
        super().train(mode)
        if self.is_frozen:
            self.front.eval()
        return self

    def lr_scales(self) -> dict[torch.nn.Parameter, float]:
        """Returns each layer's share of the learning rate; others have 1."""
        layers = self.front.encoder.layers
        return {
            parameter: self.lr_scale * self.decay ** (len(layers) - 1 - i)
            for i, layer in enumerate(layers)
            for parameter in layer.parameters()
        }

    def described(self) -> dict[str, Any]:
        """Returns arguments that make the model without the source's folder."""
        config = self.front.config.to_diff_dict()
        for name in ("_name_or_path", "transformers_version", "architectures"):
            config.pop(name, None)
        return {"source": config, "normalise": self.normalise}

    def forward(
        self, waveforms: Tensor, lengths: Tensor | None = None
    ) -> Tensor:
        """Embeds waveforms (batch, samples) as (batch, 1, dim), float32.

        `lengths` (batch,) is each waveform's own share of the samples. Without
        `lengths` all samples count.
        """
        states, n_frames = self.states(waveforms, lengths)
        return self.head(states, n_frames)[:, None]

    def states(
        self, waveforms: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns all layers' states (layers, batch, frames, width).

        The second value is the number of frames of each utterance, int64
        (batch,), or None without `lengths`. States of later frames mean
        nothing.
        """
        n = None
        if lengths is not None:
            n = (lengths * waveforms.shape[1]).round().long()
        if self.fbank is not None:
            x, n = _bert_features(self.fbank, waveforms, n)
            mask = None if n is None else length_to_mask(n, x.shape[1]).bool()
            return self._layers(x, mask), n
        x = waveforms
        if self.normalise:
            x = normalised(x[..., None], n, 0)[..., 0]
        if n is None:
            return self._layers(x, None), None
        # transformers takes a mask of samples and reduces it to frames.
        mask = length_to_mask(n, x.shape[1])
        with _padding_left_out(self.front.feature_extractor, n):
            states = self._layers(x, mask)
        config = self.front.config
        return states, _frames(n, config.conv_kernel, config.conv_stride)

    def _layers(self, x, mask):
        """Runs the speech model, and stacks the states of all layers."""
        outputs = self.front(x, attention_mask=mask, output_hidden_states=True)
        return torch.stack(outputs.hidden_states)

    def _samples_of(self, n_frames):
        """Returns the least number of samples that gives this many frames."""
        if self.fbank is not None:  # two of its frames are one of the model
            window, hop = self.fbank.window_size, self.fbank.stride
            return window + (2 * n_frames - 1) * hop
        config = self.front.config
        kernels, strides = config.conv_kernel, config.conv_stride
        for kernel, stride in zip(kernels[::-1], strides[::-1]):
            n_frames = (n_frames - 1) * stride + kernel
        return n_frames


class _LowRank(torch.nn.Module):
    """Adds a product of two thin matrices, at first 0, to a weight."""

    def __init__(self, weight, rank):
        super().__init__()
        size_after, size = weight.shape
        self.down = torch.nn.Parameter(torch.empty(rank, size))
        self.up = torch.nn.Parameter(torch.zeros(size_after, rank))
        torch.nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, weight):
        return weight + 2 * self.up @ self.down


def _frames(n, kernels, strides):
    """Returns how many frames convolutions make of n samples or frames."""
    for kernel, stride in zip(kernels, strides):
        n = (n - kernel) // stride + 1
    return n


def _bert_features(fbank, waveforms, n_samples):
    """Returns w2v-BERT's features (batch, frames, 160) and frame counts."""
    x = fbank(waveforms * 2**15)  # Kaldi's samples are 16-bit numbers
    n = n_samples
    if n is not None:
        n = (n - fbank.window_size) // fbank.stride + 1
    return model_inputs(x, n), None if n is None else n // 2


@contextlib.contextmanager
def _padding_left_out(convolutions, n_samples):
    """Makes group normalisation ignore the padding of each utterance."""
    first = convolutions.conv_layers[0]
    norm = getattr(first, "layer_norm", None)
    if not isinstance(norm, torch.nn.GroupNorm):
        yield
        return
    conv = first.conv
    n = _frames(n_samples, conv.kernel_size, conv.stride)

    def forward(norm, x):  # each group is one channel
        # Sums in 16 bits would be inaccurate.
        x = normalised(x.float().mT, n, 0, norm.eps).mT
        return x * norm.weight[:, None] + norm.bias[:, None]

    # An attribute of the instance hides the method of the class.
    norm.forward = types.MethodType(forward, norm)
    try:
        yield
    finally:
        del norm.forward
