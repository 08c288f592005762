"""The rates of some files of a user's own manifest."""

import numpy as np
import pytest
import soundfile

from lgl_plugin.dataio import bandwidths
from lgl_plugin.dataio.bandwidths import try_some, warn_of_bandwidths
from lgl_plugin.dataio.manifest import Manifest


def listed(folder, *rates):
    """A manifest of files of these rates, half a second each."""
    for n, rate in enumerate(rates):
        wav = np.full(rate // 2, 0.1)
        soundfile.write(folder / f"{n}.wav", wav, rate)
    names = [f"{n}.wav" for n in range(len(rates))]
    return Manifest.of((n, str(folder / n), 0.0, 0.5, "") for n in names)


def test_what_can_be_read_and_what_cannot(tmp_path):
    manifest = listed(tmp_path, 8000, 16000, 44101, 22050, 8000)
    (tmp_path / "4.wav").unlink()
    bad, rates = try_some(manifest, 16000)
    assert sorted(rates) == [8000, 16000, 22050]
    assert sorted(bad) == [
        ("2.wav", "has 44101 Hz, too odd to convert to 16000 Hz"),
        ("4.wav", "cannot be opened: No such file or directory"),
    ]


def test_a_sample_is_read_of_many(tmp_path, monkeypatch):
    monkeypatch.setattr(bandwidths, "N_TRIED", 3)
    names = (f"{n}.wav" for n in range(1000))
    bad, rates = try_some(Manifest.of((n, n, 0, 1, "") for n in names), 16000)
    assert len(bad) == 3 and not rates
    assert len({int(name[:-4]) // 100 for name, _ in bad}) > 1


@pytest.mark.parametrize(
    "narrow, number, warned", [(0, 4, 0), (1, 4, 1), (4, 4, 0), (0, 0, 0)]
)
def test_several_bandwidths_are_warned_of(caplog, narrow, number, warned):
    warn_of_bandwidths(narrow, number, 8000, 16000, "files tried")
    said = f"{narrow} of {number} files tried are below 16000 Hz"
    assert caplog.text.count(said) == warned
    assert caplog.text.count("--sample_rate=8000, their lowest") == warned


@pytest.mark.parametrize("to_train", [True, False])
def test_settings_against_bandwidths_are_named_where_one_trains(
    caplog, to_train
):
    warn_of_bandwidths(1, 4, 8000, 16000, "files", to_train)
    assert "1 of 4 files" in caplog.text
    for setting in ("log_mel_share=0", "cluster_twice=False"):
        assert (f" --{setting}" in caplog.text) == to_train
        assert (f" --ssps_{setting}" in caplog.text) == to_train
