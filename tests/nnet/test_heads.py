"""Heads against layers that are written out in numpy."""

import numpy as np
import pytest
import torch
from heads_by_hand import (
    batch_norm,
    cosines,
    distilled,
    layers,
    relu,
    state_of,
    stir,
)

from lgl_plugin.nnet.heads import DistillationHead, Prototypes, projector


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


def same(found, expected):
    """To 1e-5 of the largest value."""
    assert found.dtype == torch.float32
    found = found.detach().numpy()
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("last_norm", [False, True])
@pytest.mark.parametrize("sizes", [(5, 7, 3), (5, 7, 6, 3)])
def test_a_projector(sizes, last_norm):
    head = stir(projector(*sizes, last_norm=last_norm))
    x, state, n_hidden = (
        torch.randn(9, 5),
        state_of(head, "head."),
        len(sizes) - 2,
    )
    expected = layers(state, "head", x.double().numpy(), n_hidden, relu)
    if last_norm:
        last = f"head.{3 * n_hidden + 1}"
        assert f"{last}.weight" not in state
        expected = batch_norm(state, last, expected)
    same(head(x), expected)


def test_the_hidden_layers_of_a_projector_have_no_bias_before_the_norm():
    names = dict(projector(5, 7, 6, 3).named_parameters())
    assert {"0.bias", "3.bias"}.isdisjoint(names) and "6.bias" in names


@pytest.mark.parametrize("shape", [(9,), (2, 9), (4, 9)])
def test_a_distillation_head_takes_all_views_as_one_batch(shape):
    head = stir(DistillationHead(5, 16, 6))
    x = torch.randn(*shape, 5)
    expected = distilled(state_of(head, "head."), "head", x.double().numpy())
    found = head(x)
    same(found, expected)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(shape))


def test_a_distillation_heads_first_weights():
    parts = DistillationHead(64, 64, 64)
    linear = [part for part in parts if isinstance(part, torch.nn.Linear)]
    assert len(linear) == 3
    for layer in linear:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert not layer.bias.any()


def test_prototypes_are_compared_with_by_their_direction():
    prototypes = Prototypes(6, 4)
    with torch.no_grad():
        prototypes.weight.mul_(torch.tensor([[0.1], [1.0], [3.0], [20.0]]))
    vectors = torch.nn.functional.normalize(torch.randn(2, 9, 6), dim=-1)
    x, state = vectors.double().numpy(), state_of(prototypes, "head.")
    same(prototypes(vectors), cosines(state, "head", x))
    assert prototypes(vectors).abs().max() <= 1 + 1e-6


def test_prototypes_begin_within_one_over_the_root_of_their_size():
    weight = Prototypes(16, 500).weight.detach().numpy()
    assert np.abs(weight).max() <= 1 / 4
    # A uniform distribution's deviation is its half width over root 3.
    assert weight.std() == pytest.approx(1 / 4 / np.sqrt(3), rel=0.03)


def test_frozen_prototypes_answer_alike_and_take_a_gradient_of_zero():
    prototypes, vectors = Prototypes(6, 4), torch.randn(9, 6)
    vectors.requires_grad_()
    found = prototypes(vectors, frozen=True)
    assert torch.equal(found, prototypes(vectors))
    found.square().sum().backward()
    assert prototypes.weight.grad is not None
    assert not prototypes.weight.grad.any()
    assert vectors.grad.abs().sum() > 0


def test_cosines_stay_in_float32_under_autocast():
    prototypes = Prototypes(6, 4)
    vectors = torch.nn.functional.normalize(torch.randn(9, 6), dim=-1)
    with torch.autocast("cpu", torch.bfloat16):
        found = prototypes(vectors)
    same(
        found,
        cosines(
            state_of(prototypes, "head."), "head", vectors.double().numpy()
        ),
    )
