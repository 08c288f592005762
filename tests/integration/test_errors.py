"""Errors that a user meets: early, and in words that say what to do."""

import os
import shutil
import sys
import types

import pytest
import torch
import train_lgl  # of the recipe's folder
from planted import not_finite, outcomes, plant, prepare_and_spoil
from tiny import RECIPE, STAGE1, STAGE2, train_here

from lgl_plugin.dataio.trials import read_trials, trial_audio
from lgl_plugin.runs.metrics_log import read_metrics
from lgl_plugin.training.brain import SpeakerBrain
from lgl_plugin.utils.errors import TrainingFailed
from lgl_plugin.utils.files import atomic_write


@pytest.fixture
def start(corpus, tmp_path, monkeypatch):
    """Starts a stage in this process; any training is a failure."""

    def no_training(*_args, **_kwargs):
        pytest.fail("training began before the error was found")

    monkeypatch.setattr(SpeakerBrain, "fit", no_training)
    monkeypatch.setattr("lgl_plugin.training.session.Extractor", no_training)

    def start(stage, **overrides):
        if stage == 2:
            overrides = {"n_clusters": 5, **overrides}
        options = [f"--{name}={value}" for name, value in overrides.items()]
        yaml, output = f"small_stage{stage}.yaml", tmp_path / "run"
        train_here(yaml, corpus, output, *options)

    return start


def test_missing_data_folder(start):
    with pytest.raises(FileNotFoundError, match="--data_folder"):
        start(1, train_folder="/no/such/folder", data_folder="/no/such")


def test_empty_data_folder(start, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="no audio below"):
        start(
            1,
            train_folder=str(empty),
            data_folder=str(empty),
            verification_file="null",
        )


def test_missing_manifest(start, tmp_path):
    with pytest.raises(FileNotFoundError, match="manifest: .*mine.csv is no f"):
        start(1, manifest=str(tmp_path / "mine.csv"))


def test_trial_list_names_a_missing_file(start, corpus, tmp_path):
    trials = tmp_path / "trials.txt"
    good = (corpus / "trials.txt").read_text()
    trials.write_text(good + "0 ghost/1.wav ghost/2.wav\n")
    with pytest.raises(FileNotFoundError, match="ghost/1.wav"):
        start(1, verification_file=str(trials))


def test_trial_audio_that_cannot_be_read(corpus, tmp_path):
    trials = read_trials(corpus / "trials.txt", corpus / "wav")
    for name in trials.utterances:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    shutil.copy(corpus / "wav" / name, tmp_path / name)
    with pytest.raises(ValueError, match="cannot be scored") as error:
        trial_audio(trials, tmp_path)
    said = str(error.value).splitlines()
    assert said[0].startswith(f"{len(trials.utterances) - 1} of the trial")
    assert len(said) == 12 and said[1].endswith(" is empty")


def test_more_clusters_than_utterances(start, run):
    with pytest.raises(ValueError, match="n_clusters"):
        start(2, n_clusters=6000, pretrained_encoder=run / "stage1")


def test_stage2_without_an_encoder(start):
    with pytest.raises(
        FileNotFoundError, match="train_lgl.py hparams/small_stage1.yaml"
    ):
        start(2)


def test_encoder_of_another_width(start, run):
    with pytest.raises(ValueError, match="does not fit.*another width"):
        wider = "{network: {channels: [24, 24, 24, 24, 72]}}"
        start(2, pretrained_encoder=run / "stage1", new_encoder=wider)


@pytest.mark.parametrize("key", ["musan_folder", "rir_folder"])
def test_no_musan_where_the_yaml_names_it(start, key):
    with pytest.raises(FileNotFoundError, match=f"{key}: there is no folder"):
        start(1, **{key: "/no/such/folder"})


def test_faiss_missing(start, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match="pip install faiss-cpu"):
        start(2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu(start):
    with pytest.raises(ValueError, match="--device=cuda.*finds no GPU"):
        start(1, device="cuda")


def test_batch_larger_than_the_corpus(start):
    with pytest.raises(ValueError, match="Lower batch_size"):
        start(1, batch_size=512)


def test_a_wrong_setting_leaves_no_folder(corpus, tmp_path, capsys):
    """All problems are named at once, before anything is written."""
    output = tmp_path / "new" / "run"
    wrong = ["--lr=-1", "--selection=eer", "--crop_seconds=0"]
    with pytest.raises(ValueError):
        train_here("small_stage1.yaml", corpus, output, *wrong)
    said = capsys.readouterr().err.splitlines()[-3:]
    assert "selection: 'eer' should be 'last', " in said[0]
    assert said[1:] == [
        "crop_seconds: 0 should be greater than or equal to 0.1",
        "lr: -1 should be greater than 0",
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_method_that_cannot_be_made_leaves_no_folder(corpus, tmp_path):
    method = "--method=!name:lgl_plugin.methods.sdpn.SDPN {n_prototypes: -5}"
    output = tmp_path / "new" / "run"
    with pytest.raises(ValueError, match="method: n_prototypes must be 2 or"):
        train_here("small_stage1.yaml", corpus, output, method)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "early, late, raised, status",
    [
        (ValueError("no"), None, ValueError, 2),
        (RuntimeError("no"), None, RuntimeError, 2),
        (None, ValueError("no"), TrainingFailed, 1),
        (None, MemoryError("no"), TrainingFailed, 1),
        (None, SystemExit(143), SystemExit, 143),  # a signal's
    ],
)
def test_the_script_alone_ends_the_process(
    monkeypatch, capsys, early, late, raised, status
):
    """Whoever calls `train` is given the error."""

    def session(*_arguments):
        if early:
            raise early
        run = types.SimpleNamespace(plan=None)
        return types.SimpleNamespace(run=run, debug=False)

    def stage(_session):
        raise late

    settings = types.SimpleNamespace(stage=1)
    monkeypatch.setattr(train_lgl, "load_settings", lambda *_: (settings, ""))
    monkeypatch.setattr(train_lgl, "Session", session)
    with pytest.raises(raised, match="no|143"):
        train_lgl.train("yaml", {}, "", stages={1: stage})
    yaml = RECIPE / "hparams" / "small_stage1.yaml"
    monkeypatch.setattr("sys.argv", ["train_lgl.py", str(yaml)])
    with pytest.raises(SystemExit) as end:
        train_lgl.main({1: stage})
    assert end.value.code == status
    shown = capsys.readouterr().err.splitlines()[:1]
    error = early or late
    assert shown == [f"{type(error).__name__}: no"] * (status != 143)


def test_disk_full_keeps_the_previous_artefact(tmp_path, monkeypatch):
    path = tmp_path / "labels.csv"
    path.write_text("before")

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on the disk.*Make room"):
        with atomic_write(path) as out:
            out.write("after")
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["labels.csv"]


@pytest.fixture
def bad_corpus(corpus, tmp_path):
    """The corpus with a file of each planted kind; what was planted."""
    folder = tmp_path / "bad"
    shutil.copytree(corpus, folder)
    place = min(path for path in (folder / "wav").iterdir() if path.is_dir())
    return folder, plant(folder / "wav", [place])


def test_bad_files_are_named_and_skipped(bad_corpus, tmp_path):
    """What can be used is; training goes on without the rest."""
    folder, planted = bad_corpus
    output, share = tmp_path / "run", 0.5
    trials = folder / "trials.txt"
    prepare_and_spoil(folder, output, planted, share, trials)
    share = f"--max_bad_share={share}"
    train_here("small_stage1.yaml", folder, output, *STAGE1, share)
    again = [*STAGE2, "--n_iterations=1", share]
    train_here("small_stage2.yaml", folder, output, *again)
    found = outcomes(output, planted)
    wrong = [name for name, c in found.items() if c["as expected"] < 1]
    assert wrong == []
    lines = (output / "bad_files.txt").read_text("utf-8").splitlines()
    assert len(lines) == sum(counts["refused"] for counts in found.values())
    assert not_finite(output) == []
    assert not any(r.get("skipped_steps") for r in read_metrics(output))


def test_too_many_bad_files(bad_corpus, tmp_path):
    """Above the yaml's limit it stops, names ten and says what to do.

    Also where only training finds them, and when it is started again.
    """
    folder, planted = bad_corpus
    output, trials = tmp_path / "run", folder / "trials.txt"
    for name, path in planted:
        if name not in ("all zeros", "a NaN", "vanished later", "8 kHz"):
            os.unlink(folder / "wav" / path)
    planted = [p for p in planted if os.path.lexists(folder / "wav" / p[1])]
    prepare_and_spoil(folder, output, planted, 0.05, trials)
    options = [*STAGE1, "--max_bad_share=0.05"]
    for _ in range(2):
        with pytest.raises(ValueError, match="or raise max_bad_share") as error:
            train_here("small_stage1.yaml", folder, output, *options)
        assert "silent.wav: is silent: no sample" in str(error.value)
