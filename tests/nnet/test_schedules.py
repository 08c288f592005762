"""The learning rate over a training."""

import numpy as np
import pytest
import torch

from lgl_plugin.nnet.schedules import WarmupCosine, WarmupExponential, lr_groups


def test_equals_schedulers_of_torch():
    """A linear warm-up, then cosine annealing, over a thousand steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.2)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-9, 1.0, 100)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 900, 0.002)
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], [100])
    expected = []
    for _ in range(1000):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        both.step()
    schedule = WarmupCosine(0.2, warmup=0.1, final=0.01)
    found = [schedule(step / 1000) for step in range(1000)]
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_the_exponential_fall_begins_with_the_rise():
    """As in wespeaker: MoCo's peak of 0.295 at 4 % of 150 epochs."""
    schedule = WarmupExponential(0.4, warmup=0.04, final=0.0005)
    done = np.linspace(0, 1, 201)
    expected = 0.4 * np.exp(np.log(0.0005) * done) * np.minimum(done / 0.04, 1)
    np.testing.assert_allclose([schedule(d) for d in done], expected)
    assert max(expected) == pytest.approx(0.295, abs=5e-4)
    assert schedule(1.5) == pytest.approx(0.0002)


def test_stays_at_the_end_and_can_do_without_warmup():
    schedule = WarmupCosine(1.0, warmup=0.0, final=0.1)
    assert schedule(0.0) == 1.0
    assert schedule(1.0) == schedule(1.5) == pytest.approx(0.1)
    assert repr(schedule) == "WarmupCosine(lr=1.0, warmup=0.0, final=0.1)"


@pytest.mark.parametrize(
    "settings", [{"lr": 0.0}, {"warmup": 1.0}, {"final": 1.1}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        WarmupCosine(**{"lr": 0.1, **settings})


def test_groups_of_a_rate_have_each_weight_once():
    """The largest group comes first: the logged rate is the first group's."""
    a, b, c, d = (torch.nn.Parameter(torch.zeros(n + 1)) for n in range(4))
    scales = {a: 0.1, c: 0.5, d: 0.1}
    plain = lr_groups(iter([a, b, c, d]), scales)
    assert [group["lr_scale"] for group in plain] == [1.0, 0.5, 0.1]
    shapes = [[len(p) for p in group["params"]] for group in plain]
    assert shapes == [[2], [3], [1, 4]]
    # A method's own share, as of SDPN's prototypes, stays.
    (own,) = lr_groups([{"params": [a], "lr_scale": 4.0}], scales)
    assert own["lr_scale"] == 0.4
    # As SpeechBrain's remove_vector_weight_decay has them.
    given = [{"params": [a, b]}, {"params": [c, d], "weight_decay": 0.0}]
    made = torch.optim.AdamW(lr_groups(given, scales), weight_decay=0.1)
    found = {
        len(p): (group["lr_scale"], group["weight_decay"])
        for group in made.param_groups
        for p in group["params"]
    }
    assert found == {1: (0.1, 0.1), 2: (1, 0.1), 3: (0.5, 0), 4: (0.1, 0)}
