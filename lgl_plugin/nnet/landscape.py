"""Loss surfaces around a network, in directions normalised filter by filter.

Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018. A step
of length one along a direction changes each filter by the filter's own length.
A rescaling of layers that leaves the network's output as it is therefore leaves
the surface as it is, and the surfaces of two networks can be compared.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# Returns figures (n,) of the network in its current state.
Loss = Callable[[], Tensor]
Tensors = Sequence[Tensor]


def filter_lengths(parameters: Tensors) -> list[Tensor]:
    """Returns the length of each filter, in a shape that broadcasts to it.

    A filter is the weights of one output of a layer. Vectors, such as biases
    and the weights of normalisation, have length 0, so that no direction
    changes them.
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

    A direction is a list with a tensor for each parameter.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = filter_lengths(parameters)
    drawn = []
    for _ in range(number):
        normal = [
            torch.randn(p.shape, generator=generator).to(p) for p in parameters
        ]
        drawn_lengths = filter_lengths(normal)
        drawn.append(
            [
                d * length / own_length.clamp(min=1e-12)
                for d, length, own_length in zip(normal, lengths, drawn_lengths)
            ]
        )
    return drawn


@contextlib.contextmanager
def moving(
    parameters: Tensors,
) -> Iterator[Callable[[Iterable[tuple[float, Tensors]]], None]]:
    """Yields a function that moves parameters; restores them afterwards.

    The function takes pairs of a step and a direction, and moves the parameters
    from their start.
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

    `loss` returns figures (n,) of the network in its current state.
    `parameters` are moved in place and restored. `axis` has the steps along
    both directions. `progress`, such as tqdm, wraps the iteration. Returns
    float64 (len(axis), len(axis), n).
    """
    places = [(a, b) for a in axis for b in axis]
    with moving(parameters) as move:
        figures = []
        for place in progress(places):
            move(zip(place, plane))
            figures.append(_figures(loss))
    return np.array(figures).reshape(len(axis), len(axis), -1)


def rises(
    loss: Loss,
    parameters: Tensors,
    ways: Sequence[Tensors],
    radii: Sequence[float],
    progress: Callable[[Iterable], Iterable] = iter,
) -> np.ndarray:
    """Returns a loss's mean rise over steps of both signs, (ways, radii, n).

    `ways` are directions, `radii` the lengths of steps. The other arguments are
    those of `surface`.
    """
    with moving(parameters) as move:
        here = _figures(loss)
        rise = []
        for way in progress(ways):
            for radius in radii:
                ends = []
                for step in (-radius, radius):
                    move([(step, way)])
                    ends.append(_figures(loss))
                rise.append(np.mean(ends, axis=0) - here)
    return np.array(rise).reshape(len(ways), len(radii), -1)


def line(
    loss: Loss,
    module: torch.nn.Module,
    ends: tuple[dict, dict],
    places: Sequence[float],
) -> np.ndarray:
    """Evaluates a loss along the line between two state dicts of a module.

    Place 0 is the first state, place 1 the second. Running statistics are
    interpolated but never extrapolated: a variance would fall below 0. The
    module is left in the second state. Returns (len(places), n).
    """
    first, second = ends
    weights = {name for name, _ in module.named_parameters()}
    figures = []
    for place in places:
        inside = min(max(place, 0.0), 1.0)
        between = {
            name: value.lerp(second[name], place if name in weights else inside)
            if value.is_floating_point()
            else second[name]
            for name, value in first.items()
        }
        module.load_state_dict(between)
        figures.append(_figures(loss))
    module.load_state_dict(second)
    return np.array(figures)


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
    """Finds a Hessian's eigenvalue of largest magnitude by power iteration.

    The eigenvalue may be negative. In the coordinates each filter has length
    one, as in `surface`, so that the result does not depend on a layer's scale.
    `parts` return scalars with a graph, whose sum is the loss. The search ends
    after `iterations`, or once the eigenvalue changes by less than the share
    `tolerance`.
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
            # Only this kernel of attention has a second derivative.
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
