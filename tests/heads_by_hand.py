"""Heads in numpy and float64, written out, for tests that compare with them."""

import math

import numpy as np
import torch


def state_of(module, prefix=""):
    """A copy of a module's parameters and buffers by name, in float64."""
    state = module.state_dict(prefix=prefix)
    return {
        name: value.double().numpy().copy() for name, value in state.items()
    }


@torch.no_grad()
def stir(module):
    """Moves each weight off its first value, biases and norms included."""
    for parameter in module.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))
    return module


def unit(x):
    return x / np.sqrt(np.square(x).sum(-1, keepdims=True))


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0.0)


def batch_norm(state, name, x):
    """Batch normalisation in training; without weights if it has none."""
    x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    return x * state.get(f"{name}.weight", 1) + state.get(f"{name}.bias", 0)


def relu(x):
    return np.where(x > 0, x, 0.0)


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def layers(state, name, x, n_hidden, activation):
    """Linear layers with batch normalisation and an activation between them.

    They are numbered as torch numbers a Sequential's; `x` is (batch, dim).
    """
    for first in range(0, 3 * n_hidden, 3):
        x = linear(state, f"{name}.{first}", x)
        x = activation(batch_norm(state, f"{name}.{first + 1}", x))
    return linear(state, f"{name}.{3 * n_hidden}", x)


def projected(state, name, views, n_hidden=2):
    """A projector's output for views (..., dim), all in one batch."""
    flat = views.reshape(-1, views.shape[-1])
    found = layers(state, name, flat, n_hidden, relu)
    return found.reshape(*views.shape[:-1], -1)


def distilled(state, name, views):
    """A distillation head's unit vectors for views (..., dim)."""
    flat = views.reshape(-1, views.shape[-1])
    found = unit(layers(state, name, flat, 2, gelu))
    return found.reshape(*views.shape[:-1], -1)


def cosines(state, name, vectors):
    """Unit vectors times prototypes of unit length, (..., K)."""
    return vectors @ unit(state[f"{name}.weight"]).T
