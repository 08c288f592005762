"""The judge of waiting: it computes as the CPU does, and it can fail."""

import pytest
import torch
from pretended_device import DEVICE, PretendedDevice, Waits, nothing_waits


@pytest.fixture
def tensor():
    with PretendedDevice():
        yield torch.arange(6.0, device=DEVICE).reshape(2, 3)


def test_it_computes_gradients_and_steps_as_the_cpu_does(tensor):
    found = []
    for given in (tensor, tensor.cpu()):
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2).to(given.device)
        optimizer = torch.optim.Adam(layer.parameters(), fused=True)
        layer(given).square().sum().backward()
        optimizer.step()
        found.append(layer.weight.detach().cpu())
        assert layer.weight.device == given.device
    assert torch.equal(*found)


def test_what_waits_for_nothing_passes(tensor):
    mask = tensor > 2
    with nothing_waits(DEVICE) as copies:
        tensor[mask] = 0.0
        tensor.add_(torch.ones(3).to(DEVICE, non_blocking=True))
        torch.where(mask, tensor, 1.0).sum()
        count = torch.ones_like(tensor[0]).long()
        tensor[0].repeat_interleave(count, output_size=3)
    assert copies == [(3,)]


LARGE = torch.ones(2**15)


@pytest.mark.parametrize(
    "act",
    [
        lambda x: torch.ones(3).to(DEVICE),
        lambda x: torch.tensor(1.0, device=DEVICE),
        lambda x: LARGE.to(DEVICE, non_blocking=True),
        lambda x: x.copy_(torch.ones(2, 3)),
        lambda x: x.cpu(),
        lambda x: torch.ones(2, 3).copy_(x),
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.nonzero(),
        lambda x: x[0].repeat_interleave(x[0].long()),
        lambda x: x[x > 2],
        lambda x: x[torch.tensor([1])],
        lambda x: x + torch.ones(3),
        lambda x: torch.equal(x, x),
    ],
)
def test_what_would_wait_or_not_work_is_refused(tensor, act):
    with nothing_waits(DEVICE), pytest.raises(Waits):
        act(tensor)


def test_pinned_memory_of_any_size_is_not_waited_for(tensor):
    with nothing_waits(DEVICE, LARGE):
        LARGE.to(DEVICE, non_blocking=True)
