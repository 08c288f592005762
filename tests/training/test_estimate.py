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
    clock = iter([0.0, *(time for time in ENDED for _ in (0, 1))][:-1])
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: next(clock))

    class Brain:
        device_type = "cpu"

        def fit_batch(self, batch):
            return 0.0

    def fit(session, brain_class, modules, folder, epochs):
        brain = brain_class()
        for batch in ENDED:
            brain.fit_batch(batch)

    monkeypatch.setattr(estimate, "fit", fit)
    options = LoaderOptions(batch_size=8, num_workers=workers)
    session = types.SimpleNamespace(
        device=device,
        run=types.SimpleNamespace(folder=tmp_path),
        settings=types.SimpleNamespace(dataloader_options=options),
    )
    found = estimate.seconds_per_step(session, Brain, {})
    assert found == pytest.approx(expected)
