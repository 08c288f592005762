"""Steps that are not finite: they change nothing, and many end the run."""

import copy
import functools
import math
import types

import pytest
import speechbrain as sb
import torch
from pretended_device import NothingReadByTheHost
from tiny_brains import (
    BRAINS,
    add_batch_norm,
    batch,
    broken,
    changed,
    n_crops,
    train,
    warnings_of,
    weights,
)

from lgl_plugin.training.brain import STEPS_PER_READING
from lgl_plugin.training.nonfinite import NonFiniteGuard

KINDS = pytest.mark.parametrize("kind", list(BRAINS))
OPTIMIZERS = {
    "fused": functools.partial(torch.optim.Adam, lr=0.1, fused=True),
    "adam": functools.partial(torch.optim.Adam, lr=0.1),
    "fused sgd": functools.partial(
        torch.optim.SGD, lr=0.1, momentum=0.9, fused=True
    ),
    "sgd": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
}


# The guard by itself


@pytest.fixture(params=OPTIMIZERS)
def stepped(request):
    """A layer and its optimiser, behind a first step."""
    layer = torch.nn.Linear(3, 2)
    optimizer = OPTIMIZERS[request.param](layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    assert NonFiniteGuard(1).step(optimizer) == 0
    return layer, optimizer


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_wrong_gradient_and_nothing_steps(stepped, value):
    layer, optimizer = stepped
    guard = NonFiniteGuard(1)
    weight, bias = layer.weight.clone(), layer.bias.clone()
    state = copy.deepcopy(optimizer.state_dict()["state"])
    layer(torch.ones(1, 3)).sum().backward()
    layer.weight.grad[1, 2] = value
    skipped = guard.step(optimizer)
    assert skipped == 1 and skipped.shape == ()
    assert torch.equal(layer.weight, weight) and torch.equal(layer.bias, bias)
    for name, values in optimizer.state_dict()["state"].items():
        for key, tensor in values.items():
            assert torch.equal(tensor, state[name][key]), key
    assert layer.weight.grad is None
    layer(torch.ones(1, 3)).sum().backward()  # and the next one trains
    assert guard.step(optimizer) == 0
    assert not torch.equal(layer.weight, weight)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_first_step_that_is_skipped_leaves_no_momentum(name):
    """torch's fused SGD would go on with memory that nobody has written."""
    layer = torch.nn.Linear(300, 200)  # large enough for used memory
    fresh = copy.deepcopy(layer)
    guard, steps = NonFiniteGuard(1), {}
    for module in layer, fresh:
        steps[module] = OPTIMIZERS[name](module.parameters())
    layer(torch.full((1, 300), math.nan)).sum().backward()
    assert guard.step(steps[layer]) == 1
    for _ in range(2):
        for module, optimizer in steps.items():
            module(torch.ones(1, 300)).sum().backward()
            assert guard.step(optimizer) == 0
    assert torch.equal(layer.weight, fresh.weight)


def test_gradients_are_clipped():
    layer = torch.nn.Linear(3, 2, bias=False)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    (100 * layer(torch.ones(1, 3)).sum()).backward()
    NonFiniteGuard(1).step(optimizer, max_grad_norm=0.5)
    assert (layer.weight.detach() - before).norm() == pytest.approx(
        0.5, rel=1e-4
    )


@pytest.mark.parametrize("name", ["fused", "fused sgd"])
def test_a_fused_step_is_decided_on_the_device(name):
    layer = torch.nn.Linear(3, 2)
    optimizer = OPTIMIZERS[name](layer.parameters())
    layer(torch.full((1, 3), math.nan)).sum().backward()
    guard = NonFiniteGuard(1)
    with NothingReadByTheHost():
        guard.count(guard.step(optimizer))
    assert guard.in_a_row == 1


def test_steps_in_a_row_are_counted():
    guard = NonFiniteGuard(1)
    seen = []
    for skipped in (1, 1, 0, 1, 1, 1, 0):
        guard.count(torch.tensor(float(skipped)))
        seen.append(int(guard.in_a_row))
    assert seen == [1, 2, 0, 1, 2, 3, 0]


def stub(weight=1.0, step=20, epoch=7, precision="bf16"):
    """As much of a Brain as the guard looks at."""
    layer = torch.nn.Linear(2, 2)
    layer.weight.data.fill_(weight)
    return types.SimpleNamespace(
        modules={"augment": torch.nn.Identity(), "encoder": layer},
        optimizer=torch.optim.SGD(layer.parameters(), lr=0.25),
        step=step,
        epoch=epoch,
        precision=precision,
        tally=types.SimpleNamespace(average=torch.tensor(3.5)),
    )


@pytest.mark.parametrize(
    ("brain", "advice"),
    [
        (
            stub(),
            r"mean loss of 3\.5\. Try a lower lr, which is 0\.25 here, or",
        ),
        (stub(precision="fp32"), r"Try a lower lr, which is 0\.25 here\.$"),
        (stub(step=3), "No step of the epoch was finite"),
        (stub(math.nan, 3, 1), "weights of encoder are not finite.*loaded"),
        (stub(math.nan), "An earlier step made the weights of encoder inf"),
    ],
)
def test_more_in_a_row_than_allowed_are_an_error(brain, advice):
    guard = NonFiniteGuard(patience=2)
    guard.check(brain)
    for _ in range(2):
        guard.count(torch.ones(()))
    guard.check(brain)
    guard.count(torch.ones(()))
    place = f"up to step {brain.step} of epoch {brain.epoch}"
    match = rf"last 3 steps, {place}, .*{advice}"
    with pytest.raises(ValueError, match=match):
        guard.check(brain)


# In a Brain


@pytest.mark.parametrize("fused", [True, False])
@KINDS
def test_a_step_that_is_not_finite_changes_nothing(kind, fused, make):
    brain = make(kind, fused=fused)
    crops = n_crops(brain)
    brain.fit_batch(batch(crops))
    before = weights(brain)
    state = copy.deepcopy(brain.optimizer.state_dict()["state"])
    brain.fit_batch(broken(crops))
    assert changed(brain, before) == set()
    for name, values in brain.optimizer.state_dict()["state"].items():
        for key, value in values.items():
            assert torch.equal(value, state[name][key])
    assert brain.tally.counts["skipped"] == 1
    assert brain.guard.in_a_row == 1
    brain.fit_batch(batch(crops))  # and the next one trains
    assert changed(brain, before) >= {"encoder"}
    assert brain.guard.in_a_row == 0


@KINDS
def test_such_a_step_leaves_the_batch_statistics(kind, make):
    """The encoder's and those of a method's heads; evaluation reads them."""
    brain = make(kind)
    add_batch_norm(brain)
    # A teacher has been copied without them.
    if kind == "relabelled":
        brain.modules.correction.follow = lambda *_: None
    elif kind != "gated":
        brain.method.followers = lambda encoder: []

    def statistics():
        state = brain.modules.state_dict()
        kept = {k: v for k, v in state.items() if ".running_" in k}
        return {k: v.clone() for k, v in kept.items() if "teacher" not in k}

    crops = n_crops(brain)
    brain.fit_batch(batch(crops, seed=1))
    before = statistics()
    assert any("encoder" in name for name in before)
    brain.fit_batch(broken(crops))
    assert brain.tally.counts["skipped"] == 1
    for name, value in statistics().items():
        assert torch.equal(value, before[name]), name
    brain.fit_batch(batch(crops, seed=2))  # and the next one counts
    for name, value in statistics().items():
        assert not torch.equal(value, before[name]), name
    brain.modules.eval()
    assert brain.modules.encoder(batch(1).sig.data[:, 0]).isfinite().all()


@pytest.fixture
def impatient(gated):
    brain = gated(run_opts={"nonfinite_patience": 2})
    assert brain.guard.patience == 2
    return brain


def test_many_such_steps_in_a_row_end_the_run(impatient):
    train(impatient, *((STEPS_PER_READING - 3) * [False]))
    match = (
        r"last 3 steps, up to step 20 of epoch 1, .* other steps had a mean "
        r"loss of \d+\.\d+\. Try a lower lr, which is 0\.01 here"
    )
    with pytest.raises(ValueError, match=match):
        train(impatient, True, True, True)
    assert impatient.step == STEPS_PER_READING


def test_scattered_ones_do_not_end_it(impatient):
    brain = impatient
    average = train(brain, *(STEPS_PER_READING * [False, True, True]))
    brain.on_stage_end(sb.Stage.TRAIN, average, 1)
    brain.records.append(brain.record)
    assert brain.record["skipped_steps"] == 2 * STEPS_PER_READING
    assert "40 training steps were skipped" in warnings_of(brain)


def test_a_short_epoch_of_such_steps_ends_the_run_too(gated):
    brain = gated()
    brain.steps_per_reading = STEPS_PER_READING  # as on a GPU
    average = train(brain, *(5 * [True]))
    with pytest.raises(ValueError, match="No step of the epoch was finite"):
        brain.on_stage_end(sb.Stage.TRAIN, average, 1)


def test_weights_that_are_not_finite_are_named(gated):
    brain = gated()
    brain.modules.encoder.network.frame.bias.data[:] = math.nan
    with pytest.raises(ValueError, match="of encoder are not finite"):
        train(brain, *(STEPS_PER_READING * [False]))


@KINDS
def test_a_float16_step_that_is_not_finite_leaves_the_network(kind, make):
    """Nor does a teacher move; the step counts as skipped."""
    brain = make(kind)
    train(brain, False)
    brain.scaler = torch.amp.GradScaler("cpu")
    train(brain, False)
    before = weights(brain)
    train(brain, True)
    assert not changed(brain, before) - {"correction"}
    assert all(p.isfinite().all() for p in brain.modules.parameters())
    assert int(brain.guard.in_a_row) == 1
    assert float(brain.tally.counts["skipped"]) == 1
    train(brain, False)
    assert "encoder" in changed(brain, before)
    assert int(brain.guard.in_a_row) == 0


@pytest.mark.parametrize("scaled", [False, True])
def test_all_groups_of_weights_are_clipped_together(scaled, make):
    """In float16, too, where SpeechBrain clips the first group alone."""
    limit = 1e-3
    options = {"max_grad_norm": limit, "remove_vector_weight_decay": True}
    brain, norms = make("vicreg", run_opts=options), []

    def note(optimizer, *_):
        groups = [group["params"] for group in optimizer.param_groups]
        assert len(groups) == 2
        norms.extend(p.grad.norm() for group in groups for p in group)

    brain.optimizer.register_step_pre_hook(note)
    if scaled:
        brain.scaler = torch.amp.GradScaler("cpu")
    train(brain, False)
    assert torch.stack(norms).norm().item() == pytest.approx(limit, rel=1e-3)
