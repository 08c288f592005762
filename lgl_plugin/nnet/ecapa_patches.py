"""Patches of SpeechBrain's ECAPA-TDNN, each a context manager.

`padding_invariant` gives an utterance in a padded batch the embedding that it
has alone. SpeechBrain's "same" convolutions reflect a tensor at its edges. In a
padded batch the end of a shorter utterance lies inside the tensor, so the
convolution sees padding instead of the reflection. The patch reflects each
utterance at its own end, and keeps padding out of the filterbank's loudness
limit.

`lean_pooling` reduces the memory traffic of attentive pooling to a third. With
global context, SpeechBrain copies the utterance's mean and deviation to every
frame, which makes the largest tensor of the network, and multiplies that tensor
by a matrix. The product with mean and deviation is the same in all frames, so
the patch computes it once per utterance.
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

    An utterance must have more frames than that.
    """
    return max(map(_reflected, _reflecting(model)), default=0)


def relative_lengths(n_frames: Tensor, total: int) -> Tensor:
    """Returns relative lengths that mean exactly `n_frames` to SpeechBrain.

    `total` is the number of frames of the padded batch.
    """
    # SpeechBrain's modules compare frame numbers with length * total, or round
    # that product up or to the nearest. A quarter of a frame less than the true
    # length gives n_frames in all three cases, whatever the float rounding.
    return (n_frames - 0.25) / total


@contextlib.contextmanager
def padding_invariant(
    compute_features: torch.nn.Module,
    embedding_model: torch.nn.Module,
    n_frames: Tensor,
) -> Iterator[None]:
    """Makes SpeechBrain's modules embed padded utterances as if alone.

    `n_frames`, int64 (batch,), on the modules' device, is the number of frames
    of each utterance, which must be more than `reflected_frames`. Only
    filterbanks and reflecting convolutions are patched.
    """
    ends = n_frames[:, None, None]

    def silence(module, args):
        # A filterbank clips bands at 80 dB below the loudest of the tensor. A
        # frame that begins after an utterance's end may be louder than the
        # whole utterance.
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
            # Also for kernels one frame wide: SpeechBrain copies the tensor
            # even to reflect zero frames, which takes a fifth of the time on a
            # CPU.
            conv.padding = "valid"
            stack.callback(setattr, conv, "padding", "same")
            if _reflected(conv):
                handle = conv.register_forward_pre_hook(reflect)
                stack.callback(handle.remove)
        yield


def _reflecting(model: torch.nn.Module) -> list[Conv1d]:
    """Returns the convolutions that reflect, those with one-frame kernels too.

    Convolutions within a part that masks padding itself are left out: their
    frames may not be the model's frames.
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
    """Runs a model's attentive statistics pooling without the copies.

    Result and gradients equal SpeechBrain's up to rounding. A model without
    such pooling stays as it is.
    """
    pools = [
        module
        for module in model.modules()
        if isinstance(module, AttentiveStatisticsPooling)
        and module.global_context
        # Already patched by an enclosing context, which removes its patch.
        and "forward" not in vars(module)
    ]
    for pool in pools:
        # An attribute of the instance hides the method of the class.
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
        # float32, because a sum over time in x's 16 bits would be inaccurate.
        mask, share = None, torch.ones(1, 1, 1, device=x.device) / total
    else:
        mask = length_to_mask(lengths * total, total)[:, None]
        share = mask / mask.sum(2, keepdim=True)
    context = _statistics(x, share, pool.eps)
    block, conv = pool.tdnn, pool.tdnn.conv.conv
    frame_weight, context_weight = (
        conv.weight[:, : x.shape[1]],
        conv.weight[:, x.shape[1] :],
    )
    shift = torch.nn.functional.linear(
        context, context_weight[..., 0], conv.bias
    )
    hidden = torch.nn.functional.conv1d(x, frame_weight) + shift[..., None]
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
