"""The data of a session: a user's own list, what is refused, what is told."""

import functools
import logging
import os
import types

import numpy as np
import pytest
import soundfile

from lgl_plugin.dataio.bad_files import BadFiles
from lgl_plugin.dataio.manifest import Manifest
from lgl_plugin.dataio.prepare import prepare_manifest
from lgl_plugin.runs.run import Run
from lgl_plugin.runs.schema import LoaderOptions
from lgl_plugin.training import data
from lgl_plugin.training.data import (
    accept_manifest,
    check_loaders,
    read_data,
    try_manifest,
)

HEADER = "ID,duration,wav,start,stop,spk_id\n"


@pytest.fixture
def settings(monkeypatch):
    """A stage's settings, without the checks that a yaml goes through."""
    # SpeechBrain's loggers hand nothing on to pytest's.
    monkeypatch.setattr(data, "logger", logging.getLogger("t"))
    return types.SimpleNamespace(stage=2, seed=3)


def test_utterances_of_a_users_list_that_are_tested_on(
    settings, tmp_path, caplog
):
    """Of its own list the recipe leaves them out."""
    names = [f"ann/{n}.wav" for n in range(20)]
    rows = [f"{name},2,$data_root/{name},0,32000,\n" for name in names]
    (tmp_path / "own.csv").write_text(HEADER + "".join(rows))
    trials = tmp_path / "trials.txt"
    trials.write_text("1 ann/0.wav ann/1.wav\n0 ann/1.wav bob/0.wav\n")
    settings.manifest, settings.data_folder = tmp_path / "own.csv", tmp_path
    settings.trial_folder, settings.verification_file = tmp_path, trials
    settings.allow_outside_data_folder, settings.max_bad_share = False, 0.1
    settings.held_out_share, settings.labels_file = 0.3, None
    settings.dataloader_options = types.SimpleNamespace(batch_size=4)
    read_data(settings, Run(tmp_path, 2, {}))
    (message,) = caplog.messages
    assert message.startswith("2 of 20 utterances of")


@pytest.fixture
def own_list(settings, tmp_path):
    """A list of four files, of which two are logged as bad: one may be."""
    names = [f"{n}.wav" for n in range(4)]
    rows = [f"{name},2,$data_root/{name},0,32000,\n" for name in names]
    settings.manifest, settings.data_folder = tmp_path / "own.csv", tmp_path
    settings.manifest.write_text(HEADER + "".join(rows))
    settings.verification_file = settings.labels_file = None
    settings.allow_outside_data_folder, settings.max_bad_share = False, 0.4
    for name in names:
        (tmp_path / name).touch()
    log = tmp_path / "bad_files.txt"
    log.write_text("0.wav\tis read from 9 s on\n1.wav\tis empty\n")
    return log


def mend_the_list(log):
    """With other spans of the same files."""
    own = log.with_name("own.csv")
    own.write_text(own.read_text().replace(",0,32000", ",1,32001"))
    return set()


def mend_a_file(log):
    """By one with an old time, as a copy mostly has it."""
    os.utime(log.with_name("1.wav"), (0, 0))
    return {"0.wav"}


def leave_a_file_out(log):
    """In a list that is older than the log."""
    own = log.with_name("own.csv")
    lines = own.read_text().splitlines(keepends=True)
    own.write_text("".join(lines[:1] + lines[2:]))
    later = own.stat().st_ctime_ns + 10**9
    os.utime(log, ns=(later, later))
    return {"1.wav"}


@pytest.mark.parametrize("mend", [mend_the_list, mend_a_file, leave_a_file_out])
def test_what_was_mended_is_not_refused_for_old_reasons(
    settings, own_list, mend
):
    folder = own_list.parent
    with pytest.raises(ValueError, match="2 bad utterances"):
        read_data(settings, Run(folder, 2, {}))
    assert len(BadFiles(own_list).reasons) == 2  # a start lifts no limit
    left = mend(own_list)
    *_, bad = read_data(settings, Run(folder, 2, {}))
    assert {*bad.reasons} == {*BadFiles(own_list).reasons} == left


def test_files_of_a_users_list_are_tried(settings, tmp_path, caplog):
    """The preparation of a folder: its notices and refusals."""
    for n in range(4):
        wav = np.full(8000, 0.1)
        soundfile.write(tmp_path / f"{n}.wav", wav, 8000 if n < 2 else 16000)
    names = [f"{n}.wav" for n in range(4)]
    wavs = [str(tmp_path / n) for n in names]
    settings.sample_rate, settings.manifest = 16000, "mine.csv"
    manifest = Manifest.of((*both, 0.0, 0.5, "") for both in zip(names, wavs))
    bad_files = BadFiles(tmp_path / "bad_files.txt", 0)
    try_manifest(settings, manifest, bad_files)
    assert "2 of 4 files tried of mine.csv are below 16000 Hz" in caplog.text
    soundfile.write(tmp_path / "3.wav", np.full(8000, 0.1), 44101)
    with pytest.raises(ValueError, match="3.wav: has 44101 Hz, too odd"):
        try_manifest(settings, manifest, bad_files)
    settings.data_folder = "elsewhere"
    manifest = Manifest.of((n, n, 0.0, 0.5, "") for n in names)
    with pytest.raises(
        ValueError, match="--data_folder, now elsewhere, is not"
    ):
        try_manifest(settings, manifest, bad_files)
    assert [*bad_files.reasons] == ["3.wav"]


@pytest.mark.parametrize(
    "device, seconds", [("cpu", 2 * 1.5 * 8), ("cuda:0", 960.0)]
)
def test_shared_memory_holds_what_all_processes_read_ahead(
    device, seconds, settings, monkeypatch
):
    """On a GPU the extractor's batches are larger than training's."""
    asked = []
    monkeypatch.setattr(data, "check_shared_memory", asked.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    settings.crop_seconds = 1.5
    settings.sample_rate = 16000
    settings.dataloader_options = LoaderOptions(
        batch_size=8, num_workers=3, prefetch_factor=4
    )
    check_loaders(settings, device)
    assert asked == [2 * 3 * 4 * 4 * seconds * 16000]


def test_other_audio_does_not_take_the_manifest_of_stage_one(
    settings, tmp_path
):
    """Stage II on another corpus is refused before a file is replaced."""
    run = Run(tmp_path, 2, {})
    run.inputs["stage 1"] = {"manifest": "0" * 64}
    settings.train_folder = tmp_path / "wav"
    (tmp_path / "wav").mkdir()
    soundfile.write(tmp_path / "wav/a.wav", np.full(16000, 0.1), 16000)
    manifest = tmp_path / "manifest.csv"
    for name in ("manifest.csv", "bad_files.txt"):
        (tmp_path / name).write_text("of Stage I")
    with pytest.raises(ValueError, match="stage 1 of other audio.*pretrained"):
        prepare_manifest(
            tmp_path / "wav",
            manifest,
            accept=functools.partial(accept_manifest, settings, run),
        )
    for name in ("manifest.csv", "bad_files.txt"):
        assert (tmp_path / name).read_text() == "of Stage I"
    assert not list(tmp_path.glob("*.json")) + list(tmp_path.glob("*.new"))
