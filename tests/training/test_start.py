"""The weights that Stage II starts from, and advice where there are none."""

import shlex
import types

import pytest
import torch
import train_lgl  # the recipe

from lgl_plugin.nnet.encoders import Encoder
from lgl_plugin.runs.run import Run
from lgl_plugin.runs.weights import ENCODER, save_weights
from lgl_plugin.training import start as module
from lgl_plugin.training.start import (
    check_front_end,
    check_inputs,
    find_encoder,
    stage1_command,
)
from lgl_plugin.utils.files import checksum


def test_no_encoder_to_start_from_is_an_error_that_says_how(session, tmp_path):
    options = {"pretrained_encoder": None, "stage1_yaml": "s1.yaml"}
    options |= {"output_folder": "out", "data_folder": "in"}
    for name, value in options.items():
        setattr(session.settings, name, value)
    command = "train_lgl.py s1.yaml --output_folder=out --data_folder=in"
    with pytest.raises(FileNotFoundError, match=f"^Stage II: .*{command}"):
        find_encoder(session)
    session.settings.pretrained_encoder = "nowhere"
    with pytest.raises(FileNotFoundError, match="^pretrained_encoder: nowhere"):
        find_encoder(session)
    exported = tmp_path / "adapted" / "export" / "adapted"
    exported.mkdir(parents=True)
    for name in ("hyperparams.yaml", "embedding_model.ckpt"):
        (exported / name).touch()
    session.settings.pretrained_encoder = tmp_path / "adapted"
    with pytest.raises(FileNotFoundError, match=f"below it: {exported}.$"):
        find_encoder(session)


def test_an_encoder_is_not_trained_behind_other_features(tmp_path):
    """It would be fed what it was never trained on, without a word."""
    mels = {"!name:speechbrain.lobes.features.Fbank": {"n_mels": 24}}
    made = "!name:lgl_plugin.nnet.encoders.Encoder"

    def settings(rate=16000, normalise=None, network=8):
        parts = {"features": mels, "normalise": normalise, "network": network}
        return {"sample_rate": rate, "new_encoder": {made: parts}}

    run = Run(tmp_path, 1, settings())
    run.step("stage1", lambda folder: {})
    weights = tmp_path / "stage1" / ENCODER
    check_front_end(weights, settings(network=16))  # its width shows elsewhere
    with pytest.raises(ValueError, match="sample_rate: was 16000, is 8000.*"):
        check_front_end(weights, settings(rate=8000))
    with pytest.raises(ValueError, match=f"={tmp_path}/export/stage1"):
        check_front_end(weights, settings(normalise={"!name:a.B": {}}))
    # Exported folders bring their own along; others are of no run.
    exported = tmp_path / "export" / "stage1" / ENCODER
    check_front_end(exported, settings(rate=8000))
    check_front_end(tmp_path.parent / "a" / ENCODER, settings(rate=8000))


@pytest.mark.parametrize(
    "typed, advised",
    [
        (
            "s2.yaml --lr=0.1 --n_clusters=9 --data_folder 'my data' --debug",
            "s1.yaml --lr=0.1 '--data_folder=my data' --debug "
            "--output_folder=out",
        ),
        (
            "--gated_epochs 3 --noprogressbar s2.yaml --stage1_yaml s1.yaml "
            "--dataloader_options='{num_workers: 2}' --output_folder=mine",
            "--noprogressbar s1.yaml '--dataloader_options={num_workers: 2}' "
            "--output_folder=mine --data_folder=in",
        ),
    ],
)
def test_the_advised_command_has_the_options_of_the_typed_one(
    session, monkeypatch, typed, advised
):
    monkeypatch.setattr("sys.argv", ["train_lgl.py", *shlex.split(typed)])
    options = {"stage1_yaml": "s1.yaml", "output_folder": "out"}
    settings = types.SimpleNamespace(**options, data_folder="in")
    assert stage1_command(settings) == f"python train_lgl.py {advised}"
    monkeypatch.setattr("sys.argv", ["ceiling.py", *shlex.split(typed)])
    assert stage1_command(settings) == f"python train_lgl.py {advised}"


@pytest.mark.parametrize(
    "trials, stage1s, done, asked",
    [
        (None, None, [], False),
        ("one", None, [], True),
        ("one", None, ["baselines"], True),  # Stage I had no list
        ("one", "other", ["baselines"], True),
        ("one", "one", ["stage1"], True),
        ("one", "one", ["baselines"], False),
        ("one", None, ["iter1/classifier"], False),
    ],
)
def test_trial_audio_is_tried_before_the_first_round(
    session, tmp_path, monkeypatch, trials, stage1s, done, asked
):
    """A silent file would end a run of Stage II after its first phase."""
    session.settings.first_encoder = lambda: types.SimpleNamespace(
        network=torch.nn.Linear(2, 2)
    )
    first = tmp_path / "encoder.ckpt"
    save_weights(torch.nn.Linear(2, 2), first)
    for stage, digest in ((1, stage1s), (2, trials)):
        if digest:
            inputs = session.run.inputs.setdefault(f"stage {stage}", {})
            inputs["verification_file"] = digest
    session.run.done.update(dict.fromkeys(done, {}))
    heard = []

    def score(encoder):
        heard.append(encoder.network.weight.tolist())
        raise ValueError("cannot be scored")

    session.score = score
    monkeypatch.setattr(train_lgl, "find_encoder", lambda session: first)
    monkeypatch.setattr(train_lgl, "train_round", lambda this: None)
    monkeypatch.setattr(train_lgl, "Round", lambda *given: None)
    monkeypatch.setattr(train_lgl, "try_to_write_report", lambda folder: None)
    session.rows, session.given = [], None
    session.settings.n_iterations = 1
    session.settings.cluster = types.SimpleNamespace(check=lambda n: None)
    session.settings.min_cluster_size = 0
    session.settings.cluster_twice = False
    if asked:
        with pytest.raises(ValueError, match="cannot be scored"):
            train_lgl.train_stage2(session)
        assert heard == [torch.load(first)["weight"].tolist()]
    else:
        train_lgl.train_stage2(session)
        assert not heard
    assert not (tmp_path / "metrics.jsonl").exists()


def test_begun_rounds_go_on_behind_other_features(session, monkeypatch):
    """Runs of before such a check existed would be lost by it."""

    def refuse(path, settings):
        raise ValueError("another front end")

    monkeypatch.setattr(module, "check_front_end", refuse)
    monkeypatch.setattr(module, "check_weights", lambda settings, path: None)
    settings, run = session.settings, session.run
    settings.pretrained_encoder = None
    run.settings["stage 2"] = {}
    weights = run.folder / "stage1" / ENCODER
    save_weights(torch.nn.Linear(2, 2), weights)
    with pytest.raises(ValueError, match="another front end"):
        find_encoder(session)
    run.step("iter1/embeddings", lambda folder: {}, checksum(weights))
    assert find_encoder(session) == weights


def test_another_encoder_does_not_take_the_place_of_rounds(session, tmp_path):
    """Given to a begun run, or left out: both would do all rounds again."""
    for name in ("stage1", "mine"):
        save_weights(torch.nn.Linear(2, 2), tmp_path / name / ENCODER)
    settings, run = session.settings, session.run
    settings.new_encoder = lambda: types.SimpleNamespace(
        network=torch.nn.Linear(2, 2)
    )
    settings.first_encoder = settings.new_encoder
    settings.pretrained_encoder = None
    first = find_encoder(session)
    assert first == tmp_path / "stage1" / ENCODER and not run.inputs["stage 2"]
    run.step("iter1/embeddings", lambda folder: {}, checksum(first))
    settings.pretrained_encoder = tmp_path / "mine"
    with pytest.raises(ValueError, match="^pretrained_encoder: .*mine.* is"):
        find_encoder(session)
    settings.pretrained_encoder = tmp_path / "stage1"  # the same
    assert find_encoder(session) == first
    save_weights(torch.nn.Linear(2, 2), first)
    settings.pretrained_encoder = None
    with pytest.raises(ValueError, match="^pretrained_encoder: .*stage1.* is"):
        find_encoder(session)


def test_weights_to_train_that_no_encoder_has_are_refused_in_time(
    session, tmp_path
):
    """Before Stage II, and by `lgl train`, which does both, before Stage I."""
    save_weights(torch.nn.Linear(2, 2), tmp_path / "stage1" / ENCODER)
    session.settings.pretrained_encoder = None
    session.settings.new_encoder = lambda: Encoder(
        torch.nn.Identity(), torch.nn.Linear(2, 2)
    )
    session.settings.first_encoder = session.settings.new_encoder
    session.settings.trained_weights = "asp"
    with pytest.raises(ValueError, match="has 'asp' in its name"):
        find_encoder(session)
    with pytest.raises(ValueError, match="has 'asp' in its name"):
        check_inputs(session.settings, [])
