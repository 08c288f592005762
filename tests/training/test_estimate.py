"""The time of a step, as a short training shows it."""

import types

import pytest

from lgl_plugin.runs.schema import LoaderOptions
from lgl_plugin.training import estimate

# A loader of two processes has read four batches ahead. Behind them two come
# every 4 s, at 2 s a step.
ENDED = [9.0, 9.1, 9.2, 9.3, 9.4, 13.4, 13.5, 17.5, 17.6, 21.6]


@pytest.mark.parametrize(
    "device, workers, expected",
    [
        ("cuda", 2, (21.6 - 9.4) / 5),
        ("cuda", 0, (21.6 - 9.0) / 9),
        ("cpu", 2, (21.6 - 9.0) / 9),
    ],
)
def test_a_step_takes_its_share_of_the_loaders_time(
    device, workers, expected, tmp_path, monkeypatch
):
    """The median of these is a tenth of a second."""
    found = seconds_of(ENDED, device, workers, tmp_path, monkeypatch)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("n_steps", [2, 5, 6])
def test_fewer_steps_than_are_read_ahead_have_a_time(
    n_steps, tmp_path, monkeypatch
):
    """That of the last step: the others had all been read ahead."""
    ended = ENDED[:n_steps]
    found = seconds_of(ended, "cuda", 2, tmp_path, monkeypatch)
    assert found == pytest.approx(ended[-1] - ended[-2])


def seconds_of(ended, device, workers, tmp_path, monkeypatch):
    """The time of a step whose epoch's steps end so many seconds after 0."""
    clock = iter([0.0, *(time for time in ended for _ in (0, 1))][:-1])
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: next(clock))

    class Brain:
        device_type = "cpu"

        def fit_batch(self, batch):
            return 0.0

    def fit(session, brain_class, modules, folder, epochs):
        brain = brain_class()
        for batch in ended:
            brain.fit_batch(batch)

    monkeypatch.setattr(estimate, "fit", fit)
    options = LoaderOptions(batch_size=8, num_workers=workers)
    session = types.SimpleNamespace(
        device=device,
        run=types.SimpleNamespace(folder=tmp_path),
        settings=types.SimpleNamespace(dataloader_options=options),
    )
    return estimate.seconds_per_step(session, Brain, {})
