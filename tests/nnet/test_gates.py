"""Gates against maximum likelihood, numerical roots and plain counting."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from scipy.optimize import brentq, minimize
from scipy.stats import norm
from sklearn.mixture import GaussianMixture

from lgl_plugin.nnet import mixture
from lgl_plugin.nnet.gates import (
    DynamicGate,
    FixedGate,
    Gate,
    LabelCorrection,
    NoGate,
    PosteriorGate,
    ScheduleGate,
    TargetShareGate,
)
from lgl_plugin.nnet.mixture import density_crossing, fit_mixture

ALL = [
    NoGate,
    lambda: FixedGate(1.0),
    ScheduleGate,
    TargetShareGate,
    DynamicGate,
]


@pytest.mark.parametrize("make", ALL)
def test_every_gate_keeps_the_contract(make):
    gate = make()
    gate.start_iteration(1)
    for losses in (torch.rand(16) * 5, torch.ones(1), torch.empty(0)):
        losses.requires_grad_()
        mask = gate(losses)
        assert mask.dtype == torch.bool
        assert mask.shape == losses.shape
        assert not mask.requires_grad
    before = gate.tau.clone()
    gate.end_epoch(np.empty(0, dtype=np.float32))
    gate.end_epoch(np.array([np.nan, np.inf], dtype=np.float32))
    torch.testing.assert_close(gate.tau, before, equal_nan=True)


@pytest.mark.parametrize("make", ALL)
def test_tau_is_part_of_a_checkpoint(make):
    rng = np.random.default_rng(0)
    gate = make()
    gate.start_iteration(3)
    gate.end_epoch(np.exp(rng.normal(size=1000)).astype(np.float32))
    resumed = make()
    resumed.start_iteration(3)
    resumed.load_state_dict(gate.state_dict())
    losses = torch.rand(50) * 5
    assert torch.equal(gate(losses), resumed(losses))
    assert torch.equal(gate.tau, resumed.tau)


def test_arrays_and_tensors_give_the_same_tau():
    losses = torch.rand(500, generator=torch.Generator().manual_seed(0)) ** 4
    for make in (TargetShareGate, DynamicGate):
        one, other = make(), make()
        one.end_epoch(losses)
        other.end_epoch(losses.numpy())
        assert one.tau.isfinite()
        assert torch.equal(one.tau, other.tau)


def test_no_gate_rejects_nothing_at_all():
    assert NoGate()(torch.tensor([0.0, math.inf, math.nan])).all()


def test_threshold_is_inclusive_and_refuses_nan():
    mask = FixedGate(2.0)(torch.tensor([1.0, 2.0, 2.0001, math.inf, math.nan]))
    assert mask.tolist() == [True, True, False, False, False]


def test_schedule_is_the_papers_and_its_last_value_stays():
    gate = ScheduleGate()
    taus = [gate.tau.item()]
    for iteration in range(1, 8):
        gate.start_iteration(iteration)
        taus.append(gate.tau.item())
    assert taus == [1, 1, 3, 3, 5, 6, 6, 6]


finite_losses = st.lists(
    st.floats(0, 50, width=32), min_size=1, max_size=60
).map(lambda values: torch.tensor(values))


@settings(deadline=None)
@given(finite_losses, st.integers(1, 100))
@example(torch.arange(10.0), 30)
def test_target_share_is_the_smallest_that_reaches_the_share(losses, percent):
    """In a batch with no epoch seen, and on the epoch that tau came from."""
    gate = TargetShareGate(share=percent / 100)
    masks = [gate(losses)]
    gate.end_epoch(losses)
    masks.append(gate(losses))
    for mask in masks:
        # In integers: what is selected reaches the share ...
        assert 100 * mask.sum() >= percent * len(losses)
        # ... and without its largest loss it would not.
        fewer = (losses < losses[mask].max()).sum()
        assert 100 * fewer < percent * len(losses)


def test_target_share_grows_up_to_its_ceiling():
    gate = TargetShareGate(share=0.5, growth=0.2, ceiling=0.8)
    losses = torch.arange(100.0)
    selected = []
    for iteration in (1, 2, 3, 4):
        gate.start_iteration(iteration)
        selected.append(gate(losses).sum().item())
        gate.end_epoch(losses)
        selected.append(gate(losses).sum().item())
    assert selected == [50, 50, 70, 70, 80, 80, 80, 80]


def test_target_share_rounding_does_not_select_one_more():
    gate = TargetShareGate(share=0.1, growth=0.1)
    gate.start_iteration(3)  # 0.1 + 0.1 * 2 = 0.30000000000000004
    assert gate(torch.arange(10.0)).sum() == 3


def test_target_share_uses_the_epoch_once_there_is_one():
    gate = TargetShareGate(share=0.5)
    gate.end_epoch(np.arange(1, 101, dtype=np.float32))
    assert gate.tau.item() == 50
    assert gate(torch.tensor([49.0, 50.0, 51.0, 51.0])).sum() == 2
    gate.start_iteration(2)
    assert gate.tau.isnan()


def test_target_share_of_one_selects_even_losses_never_seen():
    gate = TargetShareGate(share=1.0)
    gate.end_epoch(torch.tensor([1.0, 2.0]))
    mask = gate(torch.tensor([1.0, 1e6, math.inf, math.nan]))
    assert mask.tolist() == [True, True, True, False]


def test_target_share_in_a_batch_with_nan():
    losses = torch.tensor([3.0, math.nan, 1.0, 2.0])
    assert TargetShareGate(0.5)(losses).tolist() == [False, False, True, True]
    assert TargetShareGate(0.9)(losses).tolist() == [True, False, True, True]


def two_humps(n=4000, seed=0):
    """Losses with labels: True where from the lower hump."""
    rng = np.random.default_rng(seed)
    low = rng.random(n) < 0.7
    logs = np.where(low, rng.normal(-3, 0.8, n), rng.normal(1.5, 0.5, n))
    return np.exp(logs).astype(np.float32), low


def maximum_likelihood(values, start):
    """Weights, means and variances by a general optimiser, without EM."""
    (weight, _), means, variances = start
    x0 = [math.log(weight / (1 - weight)), *means, *np.log(variances) / 2]

    def negative(parameters):
        logit, *means, log_sd1, log_sd2 = parameters
        one = norm.logpdf(values, means[0], math.exp(log_sd1))
        two = norm.logpdf(values, means[1], math.exp(log_sd2))
        evidence = np.logaddexp(logit + one, two) - np.logaddexp(logit, 0)
        return -evidence.mean()

    found = minimize(negative, x0, options={"gtol": 1e-7}).x
    weight = 1 / (1 + math.exp(-found[0]))
    return (weight, 1 - weight), found[1:3], np.exp(2 * found[3:])


@pytest.mark.parametrize("seed", range(4))
def test_mixture_has_maximum_likelihood(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    logs = np.concatenate(
        [rng.normal(-2, 1.0, 3000), rng.normal(1 + seed / 2, 0.6, 1000)]
    )
    with monkeypatch.context() as patch:
        patch.setattr(mixture, "TOLERANCE", 1e-9)
        patch.setattr(mixture, "MAX_ITERATIONS", 2000)
        weights, means, variances = fit_mixture(logs)
    truth = (0.75, 0.25), (-2, 1 + seed / 2), (1.0, 0.36)
    expected = maximum_likelihood(logs, truth)
    np.testing.assert_allclose(weights, expected[0], atol=1e-3)
    np.testing.assert_allclose(means, expected[1], atol=2e-3)
    np.testing.assert_allclose(variances, expected[2], atol=5e-3)
    # It stops earlier, and near enough for a threshold.
    crossing = density_crossing(*fit_mixture(logs))
    assert crossing == pytest.approx(
        density_crossing(weights, means, variances), abs=0.01
    )


def test_mixture_is_the_same_in_any_order_and_again():
    logs = np.log(two_humps()[0].astype(np.float64))
    once = fit_mixture(logs)
    np.random.default_rng(0).shuffle(logs)
    for first, second in zip(once, fit_mixture(logs)):
        assert (first == second).all()


@pytest.mark.parametrize("values", [[0.3, 0.3], [0.3] * 100, [1.0, 2.0]])
def test_mixture_of_equal_or_few_numbers_stays_finite(values, recwarn):
    weights, means, variances = fit_mixture(np.array(values))
    assert weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(means, [min(values), max(values)])
    np.testing.assert_allclose(variances, 1e-6, rtol=1e-3)
    assert not len(recwarn)


def test_mixture_of_many_points_is_that_of_all_of_them():
    rng = np.random.default_rng(0)
    logs = np.append(rng.normal(-2, 0.7, 150_000), rng.normal(2, 1, 50_000))
    weights, means, variances = fit_mixture(logs)
    np.testing.assert_allclose(weights, [0.75, 0.25], atol=0.005)
    np.testing.assert_allclose(means, [-2, 2], atol=0.02)
    np.testing.assert_allclose(variances, [0.49, 1], atol=0.03)


positive = st.floats(0.05, 5)


@settings(deadline=None, max_examples=300)
@given(st.floats(0.02, 0.98), st.floats(0, 8), positive, positive)
@example(0.5, 4.0, 1.0, 1.0)
@example(0.5, 0.0, 1.0, 1.0)
def test_crossing_is_where_the_densities_meet(weight, gap, sd1, sd2):
    weights, means = (weight, 1 - weight), (-1.0, -1.0 + gap)

    def difference(x):
        return (
            math.log(weights[0] / weights[1])
            + norm.logpdf(x, means[0], sd1)
            - norm.logpdf(x, means[1], sd2)
        )

    crossing = density_crossing(weights, means, (sd1**2, sd2**2))
    ends = difference(means[0]), difference(means[1])
    if min(abs(ends[0]), abs(ends[1])) < 1e-9:
        return  # on the edge, rounding decides
    if ends[0] > 0 > ends[1]:
        assert means[0] <= crossing <= means[1]
        root = brentq(difference, *means, xtol=1e-12)
        assert crossing == pytest.approx(root, abs=1e-7)
    else:
        # Never a change of sign in between, on a fine grid either.
        assert crossing is None
        signs = np.sign([difference(x) for x in np.linspace(*means, 50)])
        assert abs(signs[1:-1].sum()) == 48


def test_dynamic_gate_separates_two_humps():
    losses, low = two_humps()
    gate = DynamicGate()
    assert gate(torch.from_numpy(losses)).all()
    gate.end_epoch(losses)
    mask = gate(torch.from_numpy(losses)).numpy()
    assert (mask == low).mean() > 0.99
    again = DynamicGate()
    again.end_epoch(np.random.default_rng(1).permutation(losses))
    assert torch.equal(gate.tau, again.tau)


def test_dynamic_gate_keeps_tau_without_a_crossing():
    gate = DynamicGate()
    gate.end_epoch(two_humps()[0])
    tau = gate.tau.clone()
    gate.end_epoch(np.full(100, 0.3, dtype=np.float32))
    assert torch.equal(gate.tau, tau)
    gate.end_epoch(np.array([0.3], dtype=np.float32))
    assert torch.equal(gate.tau, tau)
    gate.start_iteration(2)
    assert gate.tau == math.inf


@pytest.mark.parametrize("memorised", [0.03, 0.3, 0.9])
def test_dynamic_gate_is_not_misled_by_memorised_utterances(memorised):
    losses, low = two_humps()
    rng = np.random.default_rng(1)
    losses[low & (rng.random(len(losses)) < memorised)] = 0.0
    gate = DynamicGate()
    gate.end_epoch(losses)
    mask = gate(torch.from_numpy(losses)).numpy()
    assert (mask == low).mean() > 0.98
    tau = gate.tau.clone()
    gate.end_epoch(np.zeros(100, dtype=np.float32))
    assert torch.equal(gate.tau, tau)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: FixedGate(0), "tau must be above 0, got 0"),
        (lambda: FixedGate(math.nan), "tau must be above 0, got nan"),
        (lambda: ScheduleGate([]), "taus must hold at least one threshold"),
        (lambda: ScheduleGate([1, -3]), "taus must be above 0, got -3"),
        (lambda: TargetShareGate(0), r"share must be in \(0, 1\], got 0"),
        (lambda: TargetShareGate(1.5), r"share must be in \(0, 1\], got 1.5"),
        (lambda: TargetShareGate(growth=-0.1), "growth must be 0 or more"),
        (
            lambda: TargetShareGate(0.5, ceiling=0.4),
            r"ceiling must be in \[share, 1\] = \[0.5, 1\], got 0.4",
        ),
        (lambda: ScheduleGate().start_iteration(0), "count from 1, got 0"),
        (lambda: TargetShareGate().start_iteration(0), "count from 1, got 0"),
        (lambda: DynamicGate().start_iteration(0), "count from 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_base_hooks_leave_tau_alone():
    gate = Gate(2.0)
    gate.start_iteration(4)
    gate.end_epoch(torch.rand(100))
    assert gate.tau == 2.0


def test_posterior_weights_are_scikit_learns():
    rng = np.random.default_rng(1)
    logs = np.append(rng.normal(-1, 0.6, 900), rng.normal(1.5, 0.4, 500))
    gate = PosteriorGate()
    first = gate(torch.tensor([1e-9, 3.0, math.nan, math.inf]))
    assert first.tolist() == [1, 1, 0, 0]
    gate.end_epoch(np.exp(logs))
    reference = GaussianMixture(2, tol=1e-7, max_iter=500, random_state=0)
    reference.fit(logs[:, None])
    low, high = sorted(reference.means_[:, 0])
    x = np.linspace(low + 0.01, high - 0.01, 50)
    column = int(np.argmin(reference.means_))
    expected = reference.predict_proba(x[:, None])[:, column]
    found = gate(torch.from_numpy(np.exp(x)))
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert found.dtype == torch.float32
    assert gate(gate.tau[None]) == pytest.approx(0.5, abs=1e-4)
    everywhere = gate(torch.logspace(-12, 12, 300))
    assert (everywhere.diff() <= 0).all()
    assert everywhere[0] > 0.99 and everywhere[-1] < 0.01
    assert gate(torch.tensor([math.nan, math.inf])).tolist() == [0, 0]


def test_posterior_gate_keeps_its_mixture_and_is_restored():
    rng = np.random.default_rng(1)
    logs = np.append(rng.normal(-1, 0.6, 900), rng.normal(1.5, 0.4, 500))
    gate, other, losses = PosteriorGate(), PosteriorGate(), torch.rand(50) * 9
    gate.end_epoch(np.exp(logs))
    known = gate(losses)
    for useless in ([], [math.nan], np.ones(100)):
        gate.end_epoch(np.asarray(useless, dtype=np.float32))
        assert torch.equal(gate(losses), known)
    other.start_iteration(2)
    other.load_state_dict(gate.state_dict())
    assert torch.equal(other(losses), known)
    gate.start_iteration(3)  # of other labels nothing is known
    assert (gate(losses) == 1).all()


@pytest.mark.parametrize(
    "module, shown",
    [
        (FixedGate(3.0), "FixedGate(tau=3)"),
        (NoGate(), "NoGate(tau=inf)"),
        (DynamicGate(), "DynamicGate(tau=inf)"),
        (ScheduleGate([1, 3]), "ScheduleGate(taus=[1.0, 3.0], tau=1)"),
        (
            TargetShareGate(0.5, 0.1, 0.9),
            "TargetShareGate(share=0.5, growth=0.1, ceiling=0.9, tau=nan)",
        ),
        (
            LabelCorrection(9, 30.0, 0.5),
            "LabelCorrection(n_utterances=9, scale=30.0, confidence=0.5, "
            "epochs=5)",
        ),
    ],
)
def test_gates_show_their_settings(module, shown):
    assert repr(module) == shown


# Label correction


@pytest.mark.parametrize("epochs", [1, 2, 3, 5])
def test_correction_by_a_count_of_explicit_softmaxes(epochs):
    """Held against plain Python, over more epochs than vote."""
    rng = np.random.default_rng(6)
    n, scale = 40, 10.0
    correct = LabelCorrection(n, scale, 0.4, epochs)
    taste = rng.uniform(-0.6, 0.6, size=(n, 12))
    ballots = [[] for _ in range(n)]
    corrections = 0
    for _ in range(8):
        rows = rng.permutation(n)[:30]  # the others are not asked
        cosines = (taste + rng.uniform(-0.3, 0.3, taste.shape))[rows]
        selected = rng.random(30) < 0.3
        found = correct(*map(torch.from_numpy, (rows, cosines, selected)))
        for ballot in ballots:
            ballot.append(None)
        expected = []
        for row, values, kept in zip(rows, cosines, selected):
            exponents = [math.exp(scale * value) for value in values]
            best = max(exponents) / sum(exponents)
            ballots[row][-1] = int(np.argmax(values)) if best > 0.4 else -1
            cast = [v for v in ballots[row][-epochs:] if v is not None]
            winner = max(cast, key=cast.count)
            wins = winner >= 0 and cast.count(winner) > len(cast) / 2
            expected.append(winner if wins and not kept else -1)
        assert found.tolist() == expected and found.dtype == torch.int64
        corrections += sum(label >= 0 for label in expected)
        votes = np.array([ballots[row][-1] for row in rows])
        correct.end_epoch(rows, votes)
    assert 20 < corrections < 160


def test_correction_at_the_scale_of_training_works_at_6000_speakers():
    """Cosines divided by 0.1 would have to reach 0.87 at 6,000 classes."""
    generator = torch.Generator().manual_seed(0)
    cosines = torch.randn(100, 6000, generator=generator) / 192**0.5
    cosines[:, 7] = 0.6
    rows, none = torch.arange(100), torch.zeros(100, dtype=torch.bool)
    assert (LabelCorrection(100)(rows, cosines, none) == 7).all()
    softer = LabelCorrection(100, scale=1 / 0.1)
    assert (softer(rows, cosines, none) == -1).all()


def test_correction_goes_on_from_a_checkpoint():
    """In the middle of an epoch, by the state alone."""
    generator = torch.Generator().manual_seed(0)
    whole = LabelCorrection(6, confidence=0.1)
    none = torch.zeros(6, dtype=torch.bool)
    for step in range(9):
        rows = torch.randperm(6, generator=generator)
        cosines = torch.rand(6, 3, generator=generator)
        resumed = LabelCorrection(6, confidence=0.1)
        resumed.load_state_dict(whole.state_dict())
        labels = whole(rows, cosines, none)
        assert torch.equal(resumed(rows, cosines, none), labels)
        if step % 2:
            whole.end_epoch(rows.numpy(), whole.votes[rows, 0].numpy())


def test_a_prediction_that_is_not_finite_is_no_vote():
    correct = LabelCorrection(2)
    rows, none = torch.arange(2), torch.zeros(2, dtype=torch.bool)
    cosines = torch.tensor([[math.nan, 0.1], [0.9, 0.1]])
    assert correct(rows, cosines, none).tolist() == [-1, 0]


@pytest.mark.parametrize(
    "wrong",
    [{"scale": 0}, {"confidence": 1.0}, {"confidence": -0.1}, {"epochs": 0}],
)
def test_correction_refuses(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LabelCorrection(3, **wrong)
