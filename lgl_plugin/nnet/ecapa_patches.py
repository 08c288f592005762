"""Padded batches in which each utterance comes out as it would alone.

SpeechBrain's "same" convolutions reflect a tensor at its edges. In a padded
batch the end of a shorter utterance lies inside the tensor, and filling takes
the place of its reflection: its last frames change, and its embedding with
them. Here hooks reflect each utterance at its own end.
"""

import contextlib

import torch
from speechbrain.dataio.dataio import length_to_mask
from speechbrain.lobes.models.ECAPA_TDNN import AttentiveStatisticsPooling
from speechbrain.nnet.CNN import Conv1d
from speechbrain.processing.features import Filterbank


def reflected_frames(model):
    """How many frames a model reflects at the end of an utterance.

    A lone utterance needs more frames than that.

    Arguments
    ---------
    model : torch.nn.Module
        What turns features into embeddings.

    Returns
    -------
    int
        0 without reflecting convolutions.

    Example
    -------
    >>> from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
    >>> reflected_frames(ECAPA_TDNN(80, channels=[16] * 5))
    4
    """
    return max(map(_reach, _reflecting(model)), default=0)


def relative_lengths(n_frames, total):
    """Relative lengths that mean exactly so many frames to SpeechBrain.

    Its modules compare frame numbers with the length times the total, or
    round that up or to the nearest. A quarter of a frame less than the true
    length is the same to all of them, whatever the float rounding.

    Arguments
    ---------
    n_frames : torch.Tensor
        Frames of each utterance, any shape, int64.
    total : int
        Frames of the padded batch.

    Returns
    -------
    torch.Tensor
        Same shape, float32.

    Example
    -------
    >>> (relative_lengths(torch.tensor([1, 2, 3]), 3) * 3).ceil()
    tensor([1., 2., 3.])
    """
    return (n_frames - 0.25) / total


@contextlib.contextmanager
def padding_invariant(compute_features, embedding_model, n_frames):
    """Lets SpeechBrain's modules treat padded utterances as if alone.

    Within it, neither the loudness limit of a filterbank nor a reflecting
    convolution sees the filling. Modules of other kinds are left as they are.

    Arguments
    ---------
    compute_features : torch.nn.Module
        Waveforms to features.
    embedding_model : torch.nn.Module
        Features to embeddings; masks the filling in its means.
    n_frames : torch.Tensor
        Frames of each utterance of the batch, shape (batch,), int64, each
        more than `reflected_frames(embedding_model)`; on the device of the modules.

    Example
    -------
    >>> from speechbrain.lobes.features import Fbank
    >>> features, conv = Fbank(n_mels=8), Conv1d(4, 5, in_channels=8)
    >>> x = torch.zeros(2, 50, 8)
    >>> x[0, :30] = torch.randn(30, 8)
    >>> with torch.no_grad():
    ...     alone = conv(x[:1, :30])
    ...     with padding_invariant(features, conv, torch.tensor([30, 50])):
    ...         together = conv(x)
    >>> torch.allclose(together[:1, :30], alone, atol=1e-6)
    True
    """
    ends = n_frames[:, None, None]

    def silence(module, args):
        # SpeechBrain cuts bands that lie 80 dB below the loudest: a frame
        # that begins before the end may be louder than all that count.
        places = torch.arange(args[0].shape[1], device=ends.device)
        return args[0].masked_fill(places[:, None] >= ends, 0.0)

    def reflect(module, args):
        x = args[0] if module.skip_transpose else args[0].transpose(1, -1)
        width = _reach(module)
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
                stack.enter_context(_hooked(module, silence))
        for module in _reflecting(embedding_model):
            stack.enter_context(_unpadded(module))
            if _reach(module):
                stack.enter_context(_hooked(module, reflect))
        yield


def _reflecting(model):
    """Convolutions that reflect, be it by no frames."""
    return [
        module
        for module in model.modules()
        if isinstance(module, Conv1d)
        and (module.padding, module.padding_mode) == ("same", "reflect")
        and module.stride == 1
    ]


def _reach(conv):
    """Frames that a convolution reflects at each end."""
    return conv.dilation * (conv.kernel_size - 1) // 2


@contextlib.contextmanager
def _unpadded(conv):
    """Keeps a convolution from padding what it gets."""
    # Those one frame wide too: SpeechBrain copies the tensor to reflect none
    # of it, a fifth of the time on a CPU.
    conv.padding = "valid"
    try:
        yield
    finally:
        conv.padding = "same"


@contextlib.contextmanager
def _hooked(module, hook):
    """Runs a hook in front of a module."""
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def lean_pooling(model):
    """Lets a model's attentive statistics pooling run without the copies.

    The result is SpeechBrain's up to rounding, gradients too; a model without
    such pooling is left as it is.

    Arguments
    ---------
    model : torch.nn.Module
        SpeechBrain's ECAPA_TDNN, or what has its pooling within.

    Example
    -------
    >>> pool, x = AttentiveStatisticsPooling(4), torch.randn(2, 4, 30)
    >>> expected = pool(x, torch.tensor([0.5, 1.0]))
    >>> with lean_pooling(pool):
    ...     found = pool(x, torch.tensor([0.5, 1.0]))
    >>> torch.allclose(found, expected, atol=1e-4)
    True
    """
    pools = [
        module
        for module in model.modules()
        if isinstance(module, AttentiveStatisticsPooling)
        and module.global_context
        and "forward" not in vars(module)  # as within another such context
    ]
    for pool in pools:
        # On the instance, where it hides the method of the class.
        pool.forward = _forward.__get__(pool)
    try:
        yield
    finally:
        for pool in pools:
            del pool.forward


def _forward(pool, x, lengths=None):
    """Weighted mean and deviation over time; (batch, channels, time) in."""
    total = x.shape[2]
    if lengths is None:
        lengths = torch.ones(len(x), device=x.device)
    mask = length_to_mask(lengths * total, total)[:, None]
    context = _statistics(x, mask / mask.sum(2, keepdim=True), pool.eps)
    block, conv = pool.tdnn, pool.tdnn.conv.conv
    own, others = conv.weight.tensor_split([x.shape[1]], dim=1)
    shift = torch.nn.functional.linear(context, others[..., 0], conv.bias)
    hidden = torch.nn.functional.conv1d(x, own) + shift[..., None]
    hidden = block.dropout(block.norm(block.activation(hidden)))
    scores = pool.conv(pool.tanh(hidden)).masked_fill(mask == 0, -torch.inf)
    return _statistics(x, scores.softmax(dim=2), pool.eps)[..., None]


def _statistics(x, weight, eps):
    """Mean and deviation under weights that sum to one, (batch, 2C)."""
    mean = (weight * x).sum(2, keepdim=True)
    variance = (weight * (x - mean).square()).sum(2)
    return torch.cat([mean[..., 0], variance.clamp(eps).sqrt()], dim=1)
