"""Errors that a user meets: early, and in words that say what to do."""

import os
import shutil
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import RECIPE, STAGE1, STAGE2, train  # the one of this folder
from hyperpyyaml import load_hyperpyyaml

from lgl_plugin.brains import SpeakerBrain
from lgl_plugin.files import atomic_write
from lgl_plugin.iterations import train_stage1, train_stage2
from lgl_plugin.training import trial_audio
from lgl_plugin.verification import read_trials


@pytest.fixture
def start(corpus, tmp_path, monkeypatch):
    """Starts a stage in this process; any training is a failure."""

    def no_training(*_args, **_kwargs):
        pytest.fail("training began before the error was found")

    monkeypatch.setattr(SpeakerBrain, "fit", no_training)
    monkeypatch.setattr("lgl_plugin.training.Extractor", no_training)

    def start(stage, device="cpu", **overrides):
        settings = {
            "data_folder": str(corpus),
            "train_folder": str(corpus / "wav"),
            "trial_folder": str(corpus / "wav"),
            "output_folder": str(tmp_path / "run"),
            "batch_size": 8,
            "n_clusters": 5,
            **overrides,
        }
        yaml = RECIPE / "hparams" / f"small_stage{stage}.yaml"
        if stage == 1:
            del settings["n_clusters"]
        with open(yaml, encoding="utf-8") as source:
            hparams = load_hyperpyyaml(source, settings)
        begin = train_stage1 if stage == 1 else train_stage2
        begin(hparams, {"device": device}, "")

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
            verification_file=None,
        )


def test_manifest_without_a_column(start, tmp_path):
    manifest = tmp_path / "mine.csv"
    manifest.write_text("ID,duration,wav,start\na,1.0,a.wav,0\n")
    with pytest.raises(ValueError, match="lacks stop, spk_id"):
        start(1, manifest=str(manifest))


def test_trial_list_names_a_missing_file(start, corpus, tmp_path):
    trials = tmp_path / "trials.txt"
    good = (corpus / "trials.txt").read_text()
    trials.write_text(good + "0 ghost/1.wav ghost/2.wav\n")
    with pytest.raises(FileNotFoundError, match="ghost/1.wav"):
        start(1, verification_file=str(trials))


def test_malformed_trial_list(start, corpus, tmp_path):
    trials = tmp_path / "trials.txt"
    good = (corpus / "trials.txt").read_text().splitlines()
    trials.write_text("\n".join([*good[:2], "1 only-one.wav", *good[2:]]))
    with pytest.raises(ValueError, match="line 3"):
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
        start(
            2,
            n_clusters=6000,
            pretrained_encoder=str(run / "stage1"),
            new_encoder={
                "channels": [16, 16, 16, 16, 48],
                "attention_channels": 16,
            },
        )


def test_stage2_without_an_encoder(start):
    with pytest.raises(
        FileNotFoundError, match="train_lgl.py hparams/small_stage1.yaml"
    ):
        start(2)


def test_encoder_of_another_width(start, run):
    with pytest.raises(ValueError, match="does not fit.*another width"):
        start(2, pretrained_encoder=str(run / "stage1"))


@pytest.mark.parametrize("key", ["musan_folder", "rir_folder"])
def test_no_musan_where_the_yaml_names_it(start, key):
    with pytest.raises(FileNotFoundError, match=f"{key}: there is no folder"):
        start(1, **{key: "/no/such/folder"})


def test_faiss_missing(start, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install .*lgl-plugin\[cpu\]"):
        start(2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu(start):
    with pytest.raises(ValueError, match="--device=cuda.*finds no GPU"):
        start(1, device="cuda")


def test_unknown_selection(start):
    with pytest.raises(ValueError, match="selection: eer"):
        start(1, selection="eer")


def test_selection_by_trials_without_trials(start):
    with pytest.raises(ValueError, match="set verification_file"):
        start(1, selection="trials", verification_file=None)


def test_batch_larger_than_the_corpus(start):
    with pytest.raises(ValueError, match="Lower batch_size"):
        start(1, batch_size=512)


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
    """The corpus with one bad file of every kind."""
    folder = tmp_path / "bad"
    shutil.copytree(corpus, folder)
    place = next(p for p in sorted((folder / "wav").iterdir()) if p.is_dir())
    place = next(p for p in sorted(place.iterdir()) if p.is_dir())
    rate, second = 16000, np.zeros(16000, dtype=np.float32)
    nan = np.full_like(second, np.nan)
    soundfile.write(place / "nan.wav", nan, rate, subtype="FLOAT")
    soundfile.write(place / "silent.wav", second, rate)
    (place / "empty.wav").write_bytes(b"")
    (place / "corrupt.wav").write_bytes(b"RIFF not really audio" * 9)
    soundfile.write(place / "header.wav", second[:0], rate)
    return folder


BAD = {"nan.wav", "silent.wav", "empty.wav", "corrupt.wav", "header.wav"}


def test_bad_files_are_named_and_skipped(bad_corpus, tmp_path):
    """Every kind is found, training and clustering go on without them."""
    output = tmp_path / "run"
    train(
        "small_stage1.yaml",
        bad_corpus,
        output,
        *STAGE1,
        "--max_bad_share=0.5",
    )
    train(
        "small_stage2.yaml",
        bad_corpus,
        output,
        *STAGE2,
        "--n_iterations=1",
        "--max_bad_share=0.5",
    )
    lines = (output / "bad_files.txt").read_text().splitlines()
    assert {os.path.basename(line.split("\t")[0]) for line in lines} == BAD
    assert len(lines) == len(BAD)
    labels = (output / "iter1" / "labels" / "labels.csv").read_text()
    assert not [name for name in BAD if name in labels]


def test_too_many_bad_files(bad_corpus, tmp_path):
    """Above the yaml's limit it stops, names some and says what to do."""
    done = train(
        "small_stage1.yaml",
        bad_corpus,
        tmp_path / "run",
        *STAGE1,
        "--max_bad_share=0.1",
        check=False,
    )
    assert done.returncode != 0
    message = done.stdout + done.stderr
    assert "max_bad_share" in message and "silent from end to end" in message
