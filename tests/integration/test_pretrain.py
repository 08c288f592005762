"""Pre-training from audio to a folder that SpeechBrain loads; the study."""

import functools
import json
import pathlib

import frozen  # of the recipe's folder
import numpy as np
import pretrain
import pretraining_study as study
import pytest
import soundfile
import torch
from speechbrain.integrations.huggingface.w2v_bert import W2VBert
from tiny import RECIPE

from lgl_plugin.metrics.agreement import ami
from lgl_plugin.nnet.encoders import Encoder
from lgl_plugin.nnet.features import Waveform
from lgl_plugin.nnet.speech_heads import MHFA
from lgl_plugin.nnet.speech_model import SpeechModel
from lgl_plugin.runs.plain import plain_settings

YAML = RECIPE / "hparams" / "small_pretrain.yaml"
RUN = {"device": "cpu", "noprogressbar": True}
TINY = """
hidden_size: 16
n_layers: 1
batch_size: 4
epochs: 2
steps_per_epoch: 2
n_codes: 5
crop_seconds: 0.5
mixing_share: 0.5
objective: hubert
"""


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech")
    rng = np.random.default_rng(0)
    for n in range(3):
        noise = rng.normal(scale=0.1, size=12000)
        soundfile.write(folder / f"{n}.wav", noise, 16000)
    return folder


def train(speech, folder, more=""):
    places = f"train_folders: ['{speech}']\noutput_folder: {folder}\n"
    places += f"features_folder: {speech.parent / 'features'}\n"
    settings, identity = pretrain.read_settings(YAML, TINY + places + more)
    pretrain.pretrain(settings, identity, RUN)
    return torch.nn.ModuleDict(
        {"model": W2VBert(str(folder / "model"), "", output_all_hiddens=True)}
    )


def test_an_interrupted_run_ends_as_another(speech, tmp_path, monkeypatch):
    whole = train(speech, tmp_path / "whole")
    states = whole["model"](torch.randn(2, 8000), torch.ones(2))
    assert states.shape == (2, 2, 24, 16)
    head = functools.partial(MHFA, embedding_size=8, heads=2, inside=4)
    network = SpeechModel(str(tmp_path / "whole" / "model"), head)
    assert Encoder(Waveform(), network)(torch.randn(2, 8000)).shape == (2, 8)
    end = pretrain.Pretraining.on_stage_end

    def end_and_die(brain, *args, **kwargs):
        end(brain, *args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretrain.Pretraining, "on_stage_end", end_and_die)
        with pytest.raises(KeyboardInterrupt):
            train(speech, tmp_path / "torn")
    torn = train(speech, tmp_path / "torn")
    for name, value in whole.state_dict().items():
        assert torn.state_dict()[name].equal(value), name
    records = [
        json.loads((tmp_path / name / "pretrain.json").read_text())
        for name in ("whole", "torn")
    ]
    for record in records:
        for epoch in record["epochs"]:
            del epoch["cpu_seconds"]
    assert records[0] == records[1] and len(records[0]["epochs"]) == 2
    with pytest.raises(ValueError, match="lr: was 0.003, is 0.1"):
        train(speech, tmp_path / "whole", "lr: 0.1")


@pytest.mark.parametrize(
    "change, message",
    [
        ("objective: hubret", "none of the objectives best_rq, hubert"),
        ("batch: 4", "batch"),
        ("mask_share: 1.0", "mask_share"),
        ("mask_frames: 101", "a crop has 100 frames"),
        ("teacher: somewhere", "no other objective takes one"),
    ],
)
def test_refusals(change, message):
    with pytest.raises((ValueError, KeyError), match=message):
        pretrain.read_settings(YAML, f"train_folders: [x]\n{change}")


def test_a_model_that_cannot_be_is_refused_before_the_features(
    speech, tmp_path, monkeypatch
):
    """And leaves nothing that would refuse the corrected command."""
    monkeypatch.setattr(pretrain, "write_log_mels", pytest.fail)
    odd = TINY.replace("hidden_size: 16", "hidden_size: 17")
    monkeypatch.setitem(globals(), "TINY", odd)
    with pytest.raises(ValueError, match="of hidden_size 17 and n_layers 1"):
        train(speech, tmp_path)
    assert not (tmp_path / pretrain.SETTINGS).exists()


def test_the_back_end_learns_speakers_with_and_without_labels():
    """Layer 0 is noise, and layer 1 has the speakers."""
    rng = np.random.default_rng(0)
    speakers = np.repeat(np.arange(8), 40)
    means = np.stack([np.zeros((8, 16)), rng.normal(size=(8, 16))], 1)
    noise = rng.normal(scale=0.3, size=(320, 2, 2, 16))
    views = torch.from_numpy(means[speakers][:, None] + noise).float()
    head = frozen.train_head(views, torch.from_numpy(speakers), 0, gated=False)
    weights = head.weights.softmax(0)
    assert weights[1] > 0.6
    first = frozen.first_labels(views)
    head, last = frozen.label_free(views, first, 0)
    assert ami(speakers, first) > 0.5 and ami(speakers, last) > 0.5
    assert head.weights.softmax(0)[1] > 0.6


def test_statistics_are_those_of_each_layer():
    log_mels = torch.randn(2, 30, 80)
    (found,) = frozen.statistics(None, log_mels).unbind(1)
    wanted = torch.cat([log_mels.mean(1), log_mels.std(1)], 1)
    torch.testing.assert_close(found, wanted)


def test_tables(tmp_path):
    """Of what is done; a claim is the mean over pairs that differ in it."""
    eers = {
        study.Model("untrained"): 30.0,
        study.Model("hubert"): 20.0,
        study.Model("hubert", share=study.PART): 25.0,
        study.Model("wav2vec2"): 22.0,
        study.Model("wav2vec2", share=study.PART): 24.0,
    }
    for model, eer in eers.items():
        (tmp_path / model.name).mkdir()
        found = {"sum": 40.0, "ami": [0.1, 0.2, 0.3], "weights": [[0.5, 0.5]]}
        found |= {"labels": [eer, eer + 1], "label_free": [eer, eer]}
        path = tmp_path / model.name / study.BACKEND
        path.write_text(json.dumps(found))
    record = {"hours": 4.92, "epochs": [{"cpu_seconds": 90.0, "loss": 1.0}]}
    record["epochs"][0]["accuracy"] = 0.5
    path = tmp_path / study.Model("hubert").name / study.RECORD
    path.write_text(json.dumps(record))
    models, claims = study.tables(tmp_path)
    assert "| 4.9 | 1.5 | 1.00 | 50.0 | 40.0 | 20.5 (20.0 to 21.0) |" in models
    assert "| all speech, not a sixteenth | 2 | -3.5 (-5.0 to -2.0) |" in claims
    assert "| pre-trained, not untrained | 2 | -9.0 (-10.0 to -8.0) |" in claims
    assert "not contrastive (wav2vec 2.0) | 2 | -0.5 (-2.0 to 1.0) |" in claims
    assert "large" not in claims


def test_precision_is_on_record(monkeypatch):
    """SpeechBrain keeps that option to itself, though it changes a run."""
    found = []
    monkeypatch.setattr(pretrain, "pretrain", lambda *run: found.extend(run))
    typed = ["pretrain.py", str(YAML), "--train_folders=[x]"]
    monkeypatch.setattr("sys.argv", [*typed, "--precision=bf16"])
    pretrain.main()
    settings, identity, _ = found
    assert settings.precision == identity["precision"] == "bf16"


@pytest.mark.parametrize(
    "run, features, message",
    [
        ("done", "other", "train_folders: was .*speech.*, is .*other"),
        ("new", "shared", "features_folder: .* has those of .*speech"),
    ],
)
def test_other_speech_is_refused(speech, tmp_path, run, features, message):
    """By a run that is done, and by the frames of the first speech."""
    train(speech, tmp_path / "done")
    folders = {"shared": speech.parent / "features"}
    settings, identity = pretrain.read_settings(
        YAML,
        f"{TINY}train_folders: ['{tmp_path / 'other'}']\n"
        f"output_folder: {tmp_path / run}\n"
        f"features_folder: {folders.get(features, tmp_path / features)}\n",
    )
    with pytest.raises(ValueError, match=message):
        pretrain.pretrain(settings, identity, RUN)


def test_a_folder_is_the_same_however_it_is_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, other = (
        pretrain.read_settings(YAML, f"train_folders: ['{typed}']")[1]
        for typed in ("speech/", pathlib.Path.cwd() / "speech")
    )
    assert one == other


def test_a_file_of_no_frame_is_left_out(tmp_path, caplog):
    for name, samples in (("long", 8000), ("short", 399)):
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(samples), 16000)
    assert [len(w) for w in pretrain.waveforms([str(tmp_path)])] == [8000]
    assert "short.wav is left out" in caplog.text


@pytest.mark.parametrize(
    "teacher, layer, size, message",
    [
        ("absent", 1, 16, "there is no"),
        ("here", 9, 16, "layers up to 1"),
        ("here", 1, 32, "hidden_size: set it to 16"),
    ],
)
def test_a_teacher_that_does_not_fit(tmp_path, teacher, layer, size, message):
    (tmp_path / "here").mkdir()
    config = {"num_hidden_layers": 1, "hidden_size": 16}
    (tmp_path / "here" / "config.json").write_text(json.dumps(config))
    places = f"train_folders: ['x']\noutput_folder: '{tmp_path}'\n"
    with pytest.raises(ValueError, match=message):
        pretrain.read_settings(
            YAML,
            TINY.replace(
                "objective: hubert", "objective: kmeans_layer"
            ).replace("hidden_size: 16", f"hidden_size: {size}")
            + f"teacher: '{tmp_path / teacher}'\nteacher_layer: {layer}\n"
            + places,
        )


@pytest.mark.parametrize(
    "options, message",
    [
        (["--epochs", "3"], "--name=value"),
        (["--seeds=5"], "holds a study of other seeds"),
        (["--seed=5"], "holds a study of other seeds, corpora, options"),
        (["--hidden_size=48"], "--hidden_size=48: the study sets that itself"),
        (["--data_share=0.5"], "--data_share=0.5: the study sets that itself"),
    ],
)
def test_a_study_is_of_one_kind(begin, capsys, options, message):
    for _ in range(2):  # the same command goes on
        with pytest.raises(InterruptedError):
            begin(YAML)
    with pytest.raises(SystemExit):
        begin(YAML, *options)
    assert message in capsys.readouterr().err


def test_a_study_is_of_one_yaml(begin, tmp_path, capsys):
    """Models that are not trained have no record of their settings."""
    with pytest.raises(InterruptedError):
        begin(YAML)
    other = tmp_path / "other.yaml"
    text = YAML.read_text("utf-8")
    other.write_text(text.replace("heads: 4", "heads: 2"), "utf-8")
    with pytest.raises(SystemExit):
        begin(other)
    assert "another yaml" in capsys.readouterr().err


@pytest.fixture
def begin(speech, tmp_path, monkeypatch):
    """Starts the study, which is interrupted before it reads audio."""

    def interrupt(*where):
        raise InterruptedError

    def start(yaml, *options):
        words = [str(yaml), f"--data_folder={speech}", *options]
        words.append(f"--output_folder={tmp_path / 'study'}")
        monkeypatch.setattr("sys.argv", ["pretraining_study.py", *words])
        study.main()

    monkeypatch.setattr(study, "Corpus", interrupt)
    return start


def test_a_model_without_weights_is_not_taken_as_done(tmp_path, monkeypatch):
    """A kill between its config and its weights, in save_pretrained."""
    model = study.Model("untrained")
    made = tmp_path / "made", YAML, f"{TINY}train_folders: [x]", model
    save = "transformers.modeling_utils.safe_save_file"
    with monkeypatch.context() as patch:
        patch.setattr(save, lambda *given, **named: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            study.make(*made)
    study.make(*made)
    assert (tmp_path / "made" / "model" / "model.safetensors").exists()


def test_a_studys_paths_are_read_as_they_are():
    """Unquoted, "Tape #3" is "Tape", and "a, b" two folders."""
    teacher = study.Model("kmeans_layer").options(pathlib.Path("/Tape #3"))
    own = {"train_folders": ["/a, b/train", "/1e3"], **teacher}
    words = ["--lr=1e-3", "--noise_folder=/lr=0.1 #2"]
    found = plain_settings(study.as_yaml(own, words))
    assert found == {**own, "lr": 1e-3, "noise_folder": "/lr=0.1 #2"}
    assert found["teacher"].startswith("/Tape #3/hubert")
