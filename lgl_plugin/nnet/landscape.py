"""Loss surfaces around a network, in directions normalised filter by filter.

Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018. A step
of length one along a direction changes each filter by as much as its own
length, so a network whose layers are scaled, to the same effect, has the same
surface, and those of two networks can be compared.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# Parts of the loss, whose mean or sum is what `surface` and others return.
Loss = Callable[[], Tensor]
Tensors = Sequence[Tensor]


def filter_lengths(parameters: Tensors) -> list[Tensor]:
    """Returns the length of each filter, of a shape that goes with its values.

    A filter is what makes one output of a layer. Vectors, such as biases and
    the weights of normalisation, have length 0: they stay as they are.
    """
    return [
        p.detach().flatten(1).norm(dim=1).reshape(-1, *[1] * (p.ndim - 1))
        if p.ndim > 1
        else torch.zeros_like(p)
        for p in parameters
    ]


def directions(
    parameters: Tensors, number: int, seed: int
) -> list[list[Tensor]]:
    """Draws normal directions, each filter as long as that of the network.

    Each is a list of a tensor for each parameter.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = filter_lengths(parameters)
    drawn = []
    for _ in range(number):
        normal = [
            torch.randn(p.shape, generator=generator).to(p) for p in parameters
        ]
        own = filter_lengths(normal)
        drawn.append(
            [
                d * length / own_length.clamp(min=1e-12)
                for d, length, own_length in zip(normal, lengths, own)
            ]
        )
    return drawn


@contextlib.contextmanager
def moving(
    parameters: Tensors,
) -> Iterator[Callable[[Iterable[tuple[float, Tensors]]], None]]:
    """Gives a function that moves parameters, and restores them after.

    It takes pairs of a step and a direction.
    """
    start = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def move(steps: Iterable[tuple[float, Tensors]]) -> None:
        for p, before in zip(parameters, start):
            p.copy_(before)
        for step, direction in steps:
            for p, d in zip(parameters, direction):
                p.add_(d, alpha=step)

    try:
        yield move
    finally:
        move([])


def surface(
    loss: Loss,
    parameters: Tensors,
    plane: Sequence[Tensors],
    axis: Sequence[float],
    progress: Callable[[Iterable], Iterable] = iter,
) -> np.ndarray:
    """Evaluates a loss over a plane of two directions through the parameters.

    `loss` returns figures (n,) of the network as it is, whose `parameters` move
    in place and come back; `axis` has the steps along either direction, and
    `progress`, such as tqdm, wraps what is iterated over. Returns float64
    (len(axis), len(axis), n).
    """
    places = [(a, b) for a in axis for b in axis]
    with moving(parameters) as move:
        found = []
        for place in progress(places):
            move(zip(place, plane))
            found.append(_figures(loss))
    return np.array(found).reshape(len(axis), len(axis), -1)


def rises(
    loss: Loss,
    parameters: Tensors,
    ways: Sequence[Tensors],
    radii: Sequence[float],
    progress: Callable[[Iterable], Iterable] = iter,
) -> np.ndarray:
    """Returns how much a loss rises, (ways, radii, n), each way and back.

    The mean over both signs of a step; other arguments as of `surface`.
    """
    with moving(parameters) as move:
        here = _figures(loss)
        found = []
        for way in progress(ways):
            for radius in radii:
                ends = []
                for step in (-radius, radius):
                    move([(step, way)])
                    ends.append(_figures(loss))
                found.append(np.mean(ends, axis=0) - here)
    return np.array(found).reshape(len(ways), len(radii), -1)


def line(
    loss: Loss,
    module: torch.nn.Module,
    ends: tuple[dict, dict],
    places: Sequence[float],
) -> np.ndarray:
    """Evaluates a loss along the line between two state dicts of a module.

    0 is the first and 1 the second. Running statistics lie between as weights
    do, but never beyond: a variance would fall below 0. The module is left at
    the second one. Returns (len(places), n).
    """
    first, second = ends
    weights = {name for name, _ in module.named_parameters()}
    found = []
    for place in places:
        inside = min(max(place, 0.0), 1.0)
        between = {
            name: value.lerp(second[name], place if name in weights else inside)
            if value.is_floating_point()
            else second[name]
            for name, value in first.items()
        }
        module.load_state_dict(between)
        found.append(_figures(loss))
    module.load_state_dict(second)
    return np.array(found)


@torch.no_grad()
def _figures(loss):
    """Returns a loss's figures as float64 (n,)."""
    return loss().double().cpu().numpy()


def top_curvature(
    parts: Iterable[Callable[[], Tensor]],
    parameters: Tensors,
    seed: int,
    iterations: int = 20,
    tolerance: float = 0.01,
    progress: Callable[[Iterable], Iterable] = iter,
) -> float:
    """Finds the largest eigenvalue of a loss's Hessian, by power iteration.

    Each filter has length one in the coordinates, as in `surface`, so that the
    result does not change with a layer's scale. It is the eigenvalue of the
    largest magnitude, whatever its sign. `parts` return scalars
    with a graph, whose sum is the loss. It ends after so many `iterations`, or
    once the eigenvalue changes by less than the share `tolerance`.
    """
    parts, scales = list(parts), filter_lengths(parameters)
    generator = torch.Generator().manual_seed(seed)
    vector = [
        torch.randn(p.shape, generator=generator).to(p) * (scale > 0)
        for p, scale in zip(parameters, scales)
    ]
    value = 0.0
    for _ in progress(range(iterations)):
        length = torch.stack([v.norm() for v in vector]).norm()
        vector = [v / length.clamp(min=1e-30) for v in vector]
        moved = [v * scale for v, scale in zip(vector, scales)]
        product = [torch.zeros_like(v) for v in vector]
        for part in parts:
            # Other kernels of attention have no second derivative.
            with sdpa_kernel(SDPBackend.MATH):
                gradients = torch.autograd.grad(
                    part(),
                    parameters,
                    create_graph=True,
                    materialize_grads=True,
                )
            slope = sum((g * m).sum() for g, m in zip(gradients, moved))
            curved = torch.autograd.grad(
                slope, parameters, materialize_grads=True
            )
            for total, c, scale in zip(product, curved, scales):
                total += c * scale
        before = value
        value = float(sum((v * c).sum() for v, c in zip(vector, product)))
        vector = product
        if abs(value - before) <= tolerance * abs(value):
            break
    return value
