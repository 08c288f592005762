"""Loss surfaces of bowls whose curvature is known, and of rescaled networks."""

import numpy as np
import pytest
import torch

from lgl_plugin.nnet.landscape import (
    directions,
    filter_lengths,
    line,
    rises,
    surface,
    top_curvature,
)


def bowl(seed=0):
    """A quadratic of a matrix and a bias; its Hessian."""
    torch.manual_seed(seed)
    weight, bias = torch.randn(3, 2).double(), torch.randn(3).double()
    root = torch.randn(9, 9).double()
    hessian = root @ root.T
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    centre = torch.cat([p.detach().flatten() for p in parameters])

    def loss():
        away = torch.cat([p.flatten() for p in parameters]) - centre
        return (away @ hessian @ away / 2)[None] + 1

    return loss, parameters, hessian


def flat(direction):
    return torch.cat([d.flatten() for d in direction])


def test_a_bowl_rises_as_its_hessian_says():
    """On the plane and along each way; the weights come back."""
    loss, parameters, hessian = bowl()
    before = [p.detach().clone() for p in parameters]
    ways = directions(parameters, 3, seed=1)
    axis = [-1.0, 0.0, 0.5]
    found = surface(loss, parameters, ways[:2], axis)[..., 0]
    a, b = map(flat, ways[:2])
    for i, x in enumerate(axis):
        for j, y in enumerate(axis):
            away = x * a + y * b
            expected = 1 + float(away @ hessian @ away) / 2
            assert found[i, j] == pytest.approx(expected)
    risen = rises(loss, parameters, ways, [0.5, 2.0])[..., 0]
    for way, values in zip(ways, risen):
        curved = float(flat(way) @ hessian @ flat(way))
        np.testing.assert_allclose(values, [curved / 8, curved * 2])
    assert all(torch.equal(p, q) for p, q in zip(parameters, before))


def test_weights_come_back_after_an_error():
    _, parameters, _ = bowl()
    before = parameters[0].detach().clone()

    def fails():
        raise RuntimeError

    with pytest.raises(RuntimeError):
        surface(fails, parameters, directions(parameters, 2, 0), [1.0])
    assert torch.equal(parameters[0], before)


def test_each_filter_moves_by_its_own_length_and_vectors_stay():
    parameters = [torch.randn(4, 3, 5), torch.randn(4), torch.randn(2, 4)]
    (way,) = directions(parameters, 1, seed=0)
    for p, d in zip(parameters[::2], way[::2]):
        torch.testing.assert_close(p.flatten(1).norm(dim=1),
                                   d.flatten(1).norm(dim=1))  # fmt: skip
    assert not way[1].any()
    assert not torch.equal(way[0], directions(parameters, 1, seed=1)[0][0])


def rescaled():
    """Two networks of one function: the first layer is scaled, then undone."""
    x = torch.randn(20, 4).double()
    target = torch.randn(20, 2).double()
    first, second = torch.randn(6, 4).double(), torch.randn(2, 6).double()
    for factor in (1.0, 8.0):
        parameters = [
            (first * factor).requires_grad_(),
            (second / factor).requires_grad_(),
        ]

        def loss(parameters=parameters):
            hidden = (x @ parameters[0].T).relu()
            return (hidden @ parameters[1].T - target).square().mean()[None]

        yield loss, parameters


def test_a_rescaled_network_looks_the_same():
    """Surface and curvature, though its raw gradients are others."""
    found = []
    for loss, parameters in rescaled():
        ways = directions(parameters, 2, seed=3)
        plane = surface(loss, parameters, ways, [-0.5, 0.2])
        curvature = top_curvature(
            [lambda loss=loss: loss()[0]], parameters, 0, 60, 0
        )
        found.append((plane, curvature))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-9)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)


def test_the_curvature_is_that_of_numpy():
    """In coordinates of the filters' lengths; of the sum of all parts."""
    loss, parameters, hessian = bowl()
    lengths = [
        length.expand_as(p)
        for length, p in zip(filter_lengths(parameters), parameters)
    ]
    scale = flat(lengths).numpy()
    expected = np.linalg.eigvalsh(scale[:, None] * hessian.numpy() * scale)[-1]
    parts = [lambda: 0.25 * loss()[0], lambda: 0.75 * loss()[0]]
    found = top_curvature(parts, parameters, 0, 200, 1e-9)
    assert found == pytest.approx(expected, rel=1e-4)


def test_attention_has_a_curvature():
    torch.manual_seed(0)
    x, weight = torch.randn(1, 1, 5, 4), torch.randn(4, 4).requires_grad_()

    def fused():
        query = x @ weight
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(query, x, x).square().sum()

    def plain():
        shares = (x @ weight @ x.mT / 2).softmax(-1)
        return (shares @ x).square().sum()

    found, expected = (
        top_curvature([loss], [weight], 0, 5) for loss in (fused, plain)
    )
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_line_joins_weights_and_statistics_but_not_beyond():
    model = torch.nn.Sequential(
        torch.nn.Linear(2, 2, bias=False), torch.nn.BatchNorm1d(2)
    ).eval()
    ends = []
    for value in (1.0, 3.0):
        state = {k: v.clone() for k, v in model.state_dict().items()}
        state["0.weight"].fill_(value)
        state["1.running_mean"].fill_(value)
        ends.append(state)

    def seen():
        return torch.stack([model[0].weight[0, 0], model[1].running_mean[0]])

    found = line(seen, model, tuple(ends), [-0.5, 0.0, 0.25, 1.0, 2.0])
    np.testing.assert_allclose(found[:, 0], [0, 1, 1.5, 3, 5])
    np.testing.assert_allclose(found[:, 1], [1, 1, 1.5, 3, 3])
    assert model[0].weight[0, 0] == 3
