"""Each method's whole loss, recomputed in numpy from its state and inputs.

In float64, from the papers' formulas. Embeddings are drawn, and no function of
the package is called. Weights are moved off their first values, so that each
of them counts.
"""

import math

import numpy as np
import pytest
import torch
from heads_by_hand import (
    batch_norm,
    cosines,
    distilled,
    projected,
    softmax,
    state_of,
    stir,
    unit,
)

from lgl_plugin.methods.dino import DINO
from lgl_plugin.methods.moco import MoCo
from lgl_plugin.methods.sdpn import SDPN
from lgl_plugin.methods.simclr import SimCLR
from lgl_plugin.methods.simsiam import SimSiam
from lgl_plugin.methods.vicreg import BarlowTwins, VICReg

BATCH, DIM = 7, 8
GROUPS = torch.arange(BATCH).expand(2, -1)
SMALL = {"hidden_size": 16}
HEAD = {**SMALL, "bottleneck_size": 6, "n_prototypes": 5}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


def draw(n_views):
    """Embeddings (n_views, BATCH, DIM), views of an utterance near others."""
    own = torch.randn(BATCH, DIM)
    return own + 0.5 + 0.7 * torch.randn(n_views, BATCH, DIM)


def made(method, **arguments):
    """A method for 20 utterances in training, its weights moved."""
    encoder = torch.nn.Linear(3, DIM)
    return stir(method(encoder, DIM, 20, **arguments)).train()


def compare(method, embeddings, targets, expected, done=0.5):
    """Asserts the loss to 1e-5; returns the figures."""
    loss, figures = method(embeddings, targets, GROUPS, done)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    return {name: value.item() for name, value in figures.items()}


def array(tensor):
    return tensor.double().numpy()


def test_simclr_without_an_adversary():
    method, views = made(SimCLR, adversarial_weight=0.0), draw(2)
    scale = math.log1p(math.exp(state_of(method)["contrastive.raw_scale"]))
    segments = unit(array(views)).reshape(2 * BATCH, DIM)
    losses = []
    for i, anchor in enumerate(segments):
        logits = scale * segments @ anchor
        others = np.delete(logits, i)
        own = logits[(i + BATCH) % (2 * BATCH)]
        losses.append(np.log(np.exp(others).sum()) - own)
    compare(method, [views], [], np.mean(losses))


def test_moco():
    """The queue holds an utterance of the batch, and is not yet full."""
    method, views, keys = made(MoCo, queue_size=9), draw(2), draw(2)
    held = torch.nn.functional.normalize(torch.randn(6, DIM), dim=-1)
    method.queue.add(torch.tensor([2, 11, 12, 13, 14, 15]), held)
    state = state_of(method)
    anchors, taught = unit(array(views)), unit(array(keys))
    losses = []
    for view in (0, 1):
        for row in range(BATCH):
            fit = [g >= 0 and g != row for g in state["queue.groups"]]
            negatives = state["queue.vectors"][fit] @ anchors[view, row]
            own = anchors[view, row] @ taught[1 - view, row]
            logits = np.array([own, *negatives]) / 0.07
            losses.append(np.log(np.exp(logits).sum()) - logits[0])
    compare(method, [views], [keys], np.mean(losses))


@pytest.mark.parametrize(
    "weights",
    [{}, {"invariance": 0.3, "variance": 2.0, "covariance": 5.0}],
    ids=["published", "others"],
)
def test_vicreg(weights):
    method, views = made(VICReg, output_size=12, **SMALL, **weights), draw(2)
    used = {"invariance": 1, "variance": 1, "covariance": 0.1, **weights}
    first, second = projected(state_of(method), "projector", array(views))
    parts = {"invariance": np.square(first - second).mean()}
    parts["variance"] = parts["covariance"] = 0
    for view in (first, second):
        covariance = np.cov(view.T)
        deviations = np.sqrt(np.diag(covariance) + 1e-4)
        parts["variance"] += np.maximum(0, 1 - deviations).mean()
        off_diagonal = covariance[~np.eye(12, dtype=bool)]
        parts["covariance"] += np.square(off_diagonal).sum() / 12
    loss = sum(used[name] * part for name, part in parts.items())
    figures = compare(method, [views], [], loss)
    assert figures == pytest.approx(parts, rel=1e-5)


@pytest.mark.parametrize(
    "weights",
    [{}, {"redundancy": 0.2, "weight": 3.0}],
    ids=["published", "others"],
)
def test_barlow_twins(weights):
    arguments = {"output_size": 12, **SMALL, **weights}
    method, views = made(BarlowTwins, **arguments), draw(2)
    used = {"redundancy": 0.005, "weight": 0.025, **weights}
    found = projected(state_of(method), "projector", array(views))
    first, second = (batch_norm({}, "", view) for view in found)
    correlation = first.T @ second / BATCH
    on = np.square(1 - np.diag(correlation)).sum()
    off = np.square(correlation[~np.eye(12, dtype=bool)]).sum()
    expected = used["weight"] * (on + used["redundancy"] * off)
    compare(method, [views], [], expected)


def test_simsiam():
    """A view predicts the other's projection, not its own."""
    method, views = made(SimSiam, predictor_size=4, **SMALL), draw(2)
    state = state_of(method)
    flat = projected(state, "projector", array(views)).reshape(2 * BATCH, -1)
    flat = batch_norm(state, "projector.7", flat)
    predicted = projected(state, "predictor", flat, n_hidden=1)
    z, p = unit(flat).reshape(2, BATCH, -1), unit(predicted)
    p = p.reshape(2, BATCH, -1)
    expected = -((p[0] * z[1]).sum(1) + (p[1] * z[0]).sum(1)).mean() / 2
    compare(method, [views], [], expected)


def use_of(targets):
    """The figures of how targets (n, K) use the prototypes."""
    mean = targets.mean(0)
    own = -(targets * np.log(targets)).sum(1).mean()
    used = math.exp(-(mean * np.log(mean)).sum())
    return {
        "teacher_entropy": own / math.log(targets.shape[1]),
        "prototypes_used": used,
    }


@pytest.mark.parametrize("n_local", [0, 4])
@pytest.mark.parametrize(("done", "temperature"), [(0.1, 0.055), (0.6, 0.07)])
@pytest.mark.parametrize("weight", [0.0, 0.2], ids=["dino", "rdino"])
def test_dino_and_rdino(weight, done, temperature, n_local):
    """The teacher's temperature rises from 0.04 to 0.07 in a fifth."""
    method = made(
        DINO,
        n_local=n_local,
        teacher_temperatures=[0.04, 0.07],
        regularisation=weight,
        **HEAD,
    )
    method.centre.copy_(0.1 * torch.randn(5))
    state, taught = state_of(method), draw(2)
    embeddings = [draw(2), draw(n_local)] if n_local else [draw(2)]
    teacher = distilled(state, "teacher_head.copy", array(taught))
    teacher = cosines(state, "teacher_prototypes.copy", teacher)
    targets = softmax((teacher - state["centre"]) / temperature)
    views = array(torch.cat(embeddings))
    logits = cosines(state, "prototypes", distilled(state, "head", views))
    logs = np.log(softmax(logits / 0.1))
    pairs = [
        -(targets[i] * logs[j]).sum(1).mean()
        for i in (0, 1)
        for j in range(2 + n_local)
        if i != j
    ]
    loss = np.mean(pairs)
    # RDINO: a quarter of the weight at first, all of it after a seventh.
    covariance = np.cov(array(embeddings[0].mean(0)).T)
    deviations = np.sqrt(np.diag(covariance) + 1e-4)
    off_diagonal = np.square(covariance[~np.eye(DIM, dtype=bool)]).sum()
    extra = 5 * np.maximum(0, 1 - deviations).mean() + off_diagonal / 5
    loss += weight * min(0.25 + 0.75 * done * 7, 1) * extra
    figures = compare(method, embeddings, [taught], loss, done)
    assert figures == pytest.approx(use_of(targets.reshape(-1, 5)), rel=1e-4)
    moved = 0.9 * state["centre"] + 0.1 * teacher.mean((0, 1))
    assert method.centre.numpy() == pytest.approx(moved, rel=1e-4)


def spread_evenly(probabilities):
    """Sinkhorn's three iterations, of probabilities (n, K), by loops."""
    n, n_prototypes = probabilities.shape
    shares = probabilities.copy()
    for _ in range(3):
        for k in range(n_prototypes):
            shares[:, k] /= n_prototypes * shares[:, k].sum()
        for row in range(n):
            shares[row] /= n * shares[row].sum()
    return n * shares


def nearest_distances(points):
    return [
        min(np.linalg.norm(a - b) for j, b in enumerate(points) if j != i)
        for i, a in enumerate(points)
    ]


@pytest.mark.parametrize("queued", [0, 4, 9])
@pytest.mark.parametrize(
    "weights",
    [
        {},
        {
            "mean_entropy": 0.3,
            "koleo": 0.5,
            "dimension": 0.7,
            "off_diagonal": 0.2,
        },
    ],
    ids=["published", "all terms"],
)
def test_sdpn(weights, queued):
    """Without a queue, with one that is not yet full, and with a full one."""
    method = made(SDPN, queue_size=9 if queued else 0, **HEAD, **weights)
    used = {"mean_entropy": 1.0, "koleo": 0.1, **weights}
    views, taught = draw(4), draw(1)
    if queued:
        # As `clear` leaves them, vectors in empty places are not zero.
        vectors = torch.nn.functional.normalize(torch.randn(9, 6), dim=1)
        method.queue.vectors.copy_(vectors)
        method.queue.groups[:queued] = 10 + torch.arange(queued)
        method.queue.place.fill_(queued % 9)
    state = state_of(method)

    def sharpened(vectors):
        """The teacher's probabilities to the power of 1 / 0.25, rescaled."""
        powers = softmax(cosines(state, "prototypes", vectors) / 0.1) ** 4
        return powers / powers.sum(1, keepdims=True)

    outputs = distilled(state, "teacher_head.copy", array(taught[0]))
    own = sharpened(outputs)
    everything = own
    if queued:
        held = state["queue.vectors"][state["queue.groups"] >= 0]
        everything = np.concatenate([own, sharpened(held)])
    targets = spread_evenly(everything)[:BATCH]

    e = array(views)
    logits = cosines(state, "prototypes", distilled(state, "head", e))
    found = softmax(logits / 0.1)
    loss = -(targets * np.log(found)).sum(-1).mean()
    mean = found.mean((0, 1))
    parts = {
        "mean_entropy": math.log(5) + (mean * np.log(mean)).sum(),
        "koleo": sum(
            -np.log(nearest_distances(unit(view))).mean() for view in e
        ),
    }
    columns = e.reshape(-1, DIM)
    columns = columns / np.sqrt(np.square(columns).sum(0))
    squares = np.square(columns.T @ columns)
    if weights:
        parts["dimension"] = 0.5 * math.log(squares.sum())
        parts["off_diagonal"] = squares[~np.eye(DIM, dtype=bool)].sum() / DIM
    loss += sum(used[name] * part for name, part in parts.items())
    figures = compare(method, [views], [taught], loss)
    assert figures == pytest.approx({**parts, **use_of(own)}, rel=1e-4)
    if queued:  # the batch follows what was held, and the oldest went
        latest = [*range(10, 10 + queued), *range(BATCH)][-9:]
        assert sorted(method.queue.groups.tolist()) == sorted(latest)
        for row, vector in enumerate(outputs):
            (place,) = (method.queue.groups == row).nonzero()
            kept = method.queue.vectors[place[0]].numpy()
            assert kept == pytest.approx(vector, abs=1e-5)
