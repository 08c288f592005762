"""Patches of SpeechBrain's ECAPA-TDNN, each a context manager.

`padding_invariant` changes how convolutions pad and how the filterbank limits
loudness. SpeechBrain's "same" convolutions reflect a tensor at its edges: in a
padded batch the end of a shorter utterance lies inside the tensor, filling
takes the place of its reflection, and its embedding changes. Under the patch
each utterance is reflected at its own end and comes out as it would alone.

`lean_pooling` changes how attentive pooling computes its context. With global
context, the attention looks at each frame beside the utterance's mean and
deviation, which SpeechBrain copies to every frame: the largest tensor of the
network, and a matrix product over it. A linear map of them is the same in all
frames, so the patch adds it once per utterance, with a third of the memory
traffic.
"""

import contextlib
from collections.abc import Iterator

import torch
from speechbrain.dataio.dataio import length_to_mask
from speechbrain.lobes.models.ECAPA_TDNN import AttentiveStatisticsPooling
from speechbrain.nnet.CNN import Conv1d
from speechbrain.processing.features import Filterbank
from torch import Tensor


def reflected_frames(model: torch.nn.Module) -> int:
    """Returns how many frames a model reflects at the end of an utterance.

    A lone utterance needs more frames than that.
    """
    return max(map(_reflected, _reflecting(model)), default=0)


def relative_lengths(n_frames: Tensor, total: int) -> Tensor:
    """Returns relative lengths that mean exactly `n_frames` to SpeechBrain.

    `total` is the number of frames of the padded batch.
    """
    # SpeechBrain's modules compare frame numbers with length * total, or round
    # that up or to the nearest. A quarter of a frame less than the true length
    # gives the same in all of them, whatever the float rounding.
    return (n_frames - 0.25) / total


@contextlib.contextmanager
def padding_invariant(
    compute_features: torch.nn.Module,
    embedding_model: torch.nn.Module,
    n_frames: Tensor,
) -> Iterator[None]:
    """Lets padded utterances come out of SpeechBrain's modules as if alone.

    `n_frames`, int64, shape (batch,), on the device of the modules, holds the
    frames of each utterance, each more than `reflected_frames`. Modules other
    than filterbanks and reflecting convolutions are left as they are.
    """
    ends = n_frames[:, None, None]

    def silence(module, args):
        # A filterbank cuts bands 80 dB below the loudest of the tensor; a
        # frame that begins behind an utterance's end may be louder than all
        # of the utterance.
        places = torch.arange(args[0].shape[1], device=ends.device)
        return args[0].masked_fill(places[:, None] >= ends, 0.0)

    def reflect(module, args):
        x = args[0] if module.skip_transpose else args[0].transpose(1, -1)
        width = _reflected(module)
        steps = torch.arange(width, device=ends.device)
        shape = (-1, x.shape[1], -1)
        padded = torch.nn.functional.pad(x, (width, width))
        padded[..., :width] = x[..., 1 : width + 1].flip(-1)
        source = x.gather(2, (ends - 2 - steps).expand(shape))
        padded.scatter_(2, (ends + width + steps).expand(shape), source)
        return padded if module.skip_transpose else padded.transpose(1, -1)

    with contextlib.ExitStack() as stack:
        for module in compute_features.modules():
            if isinstance(module, Filterbank):
                handle = module.register_forward_pre_hook(silence)
                stack.callback(handle.remove)
        for conv in _reflecting(embedding_model):
            # Kernels one frame wide too: SpeechBrain copies the tensor to
            # reflect none of it, a fifth of the time on a CPU.
            conv.padding = "valid"
            stack.callback(setattr, conv, "padding", "same")
            if _reflected(conv):
                handle = conv.register_forward_pre_hook(reflect)
                stack.callback(handle.remove)
        yield


def _reflecting(model: torch.nn.Module) -> list[Conv1d]:
    """Returns the convolutions that reflect, be it by no frames.

    Not those within a part that masks padding itself, whose frames may be
    others than the model's.
    """
    masked = {
        inner
        for part in model.modules()
        if getattr(part, "masks_padding", False)
        for inner in part.modules()
    }
    return [
        module
        for module in model.modules()
        if isinstance(module, Conv1d)
        and module not in masked
        and (module.padding, module.padding_mode) == ("same", "reflect")
        and module.stride == 1
    ]


def _reflected(conv: Conv1d) -> int:
    """Returns the frames that a convolution reflects at each end."""
    return conv.dilation * (conv.kernel_size - 1) // 2


@contextlib.contextmanager
def lean_pooling(model: torch.nn.Module) -> Iterator[None]:
    """Lets a model's attentive statistics pooling run without the copies.

    The result is SpeechBrain's up to rounding, gradients too; a model without
    such pooling is left as it is.
    """
    pools = [
        module
        for module in model.modules()
        if isinstance(module, AttentiveStatisticsPooling)
        and module.global_context
        # An enclosing context has patched it, and will end the patch.
        and "forward" not in vars(module)
    ]
    for pool in pools:
        # On the instance, where it hides the method of the class.
        pool.forward = _lean_forward.__get__(pool)
    try:
        yield
    finally:
        for pool in pools:
            del pool.forward


def _lean_forward(pool, x, lengths=None):
    """Returns weighted mean and deviation over time, (batch, 2C, 1)."""
    total = x.shape[2]
    if lengths is None:
        # In float32: the sum over time would suffer from x's 16 bits.
        mask, share = None, torch.ones(1, 1, 1, device=x.device) / total
    else:
        mask = length_to_mask(lengths * total, total)[:, None]
        share = mask / mask.sum(2, keepdim=True)
    context = _statistics(x, share, pool.eps)
    block, conv = pool.tdnn, pool.tdnn.conv.conv
    own, others = conv.weight[:, : x.shape[1]], conv.weight[:, x.shape[1] :]
    shift = torch.nn.functional.linear(context, others[..., 0], conv.bias)
    hidden = torch.nn.functional.conv1d(x, own) + shift[..., None]
    hidden = block.dropout(block.norm(block.activation(hidden)))
    scores = pool.conv(pool.tanh(hidden))
    if mask is not None:
        scores = scores.masked_fill(mask == 0, -torch.inf)
    return _statistics(x, scores.softmax(dim=2), pool.eps)[..., None]


def _statistics(x, weight, eps):
    """Returns mean and deviation under weights that sum to one, (batch, 2C)."""
    mean = (weight * x).sum(2, keepdim=True)
    variance = (weight * (x - mean).square()).sum(2)
    return torch.cat([mean[..., 0], variance.clamp(eps).sqrt()], dim=1)
