"""The anchor's penalty and its gradient, against the formula."""

import pytest
import torch

from lgl_plugin.nnet.anchor import Anchor


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)
    )


def test_nothing_at_the_start_and_the_squared_distance_after():
    moved = network()
    anchor = Anchor(moved.state_dict(), weight=0.3)
    assert anchor(moved) == 0
    anchor(moved).backward()
    assert all((p.grad == 0).all() for p in moved.parameters())
    with torch.no_grad():
        steps = [torch.randn_like(p) for p in moved.parameters()]
        for parameter, step in zip(moved.parameters(), steps):
            parameter += step
    expected = 0.3 * sum((step.double() ** 2).sum() for step in steps)
    assert anchor(moved).item() == pytest.approx(expected.item(), rel=1e-5)
    moved.zero_grad()
    anchor(moved).backward()
    for parameter, step in zip(moved.parameters(), steps):
        torch.testing.assert_close(parameter.grad, 0.6 * step)


def test_it_is_of_no_checkpoint_and_no_optimiser():
    anchor = Anchor(network().state_dict(), weight=1.0)
    assert not anchor.state_dict() and not list(anchor.parameters())


def test_statistics_of_batches_are_free():
    moved = network()
    anchor = Anchor(moved.state_dict(), weight=1.0)
    moved(torch.randn(8, 3))
    assert moved[1].running_mean.any() and anchor(moved) == 0


def test_it_holds_the_named_part_of_what_is_trained():
    moved = network()
    anchor = Anchor(moved.state_dict(), weight=1.0, prefix="2.")
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter += 1
    assert anchor(moved).item() == pytest.approx(10)
    moved[2].bias.requires_grad_(False)
    assert anchor(moved).item() == pytest.approx(8)
    moved.requires_grad_(False)
    with pytest.raises(ValueError, match="anchor has no effect"):
        anchor(moved)
