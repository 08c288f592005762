"""SpeechBrain's attentive pooling with a third of the memory traffic.

With global context, ECAPA-TDNN's attention looks at each frame beside the
utterance's mean and deviation, which SpeechBrain copies to every frame: the
largest tensor of the network, and a matrix product over it. What a linear map
makes of them is the same in all frames, so it is added once per utterance.
"""

import contextlib

import torch
from speechbrain.dataio.dataio import length_to_mask
from speechbrain.lobes.models.ECAPA_TDNN import AttentiveStatisticsPooling


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
