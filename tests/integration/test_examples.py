"""The examples run on the tiny corpus, one on what the other wrote."""

import csv
import importlib
import inspect
import re

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN, Classifier
from tiny import ROOT, run_script

from lgl_plugin.clustering import average, kmeans, two_step
from lgl_plugin.dataio.audio import read_audio
from lgl_plugin.inference.extractor import load_extractor
from lgl_plugin.nnet import gates, losses
from lgl_plugin.nnet.gates import Gate

EXAMPLES = ROOT / "examples"
# What SpeechBrain's EncoderClassifier loads, as its published encoders are.
HYPERPARAMS = """
compute_features: !new:speechbrain.lobes.features.Fbank
    n_mels: 80
mean_var_norm: !new:speechbrain.processing.features.InputNormalization
    norm_type: sentence
    std_norm: False
embedding_model: !new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN
    input_size: 80
    channels: [16, 16, 16, 16, 48]
    lin_neurons: 32
classifier: !new:speechbrain.lobes.models.ECAPA_TDNN.Classifier
    input_size: 32
    out_neurons: 7
modules:
    compute_features: !ref <compute_features>
    mean_var_norm: !ref <mean_var_norm>
    embedding_model: !ref <embedding_model>
    classifier: !ref <classifier>
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        embedding_model: !ref <embedding_model>
        classifier: !ref <classifier>
"""


def run_example(script, output, *options):
    """Runs an example as its first lines say; what it printed."""
    return run_script(
        EXAMPLES / script,
        (EXAMPLES / script).with_suffix(".yaml"),
        f"--output_folder={output}",
        "--device=cpu",
        *options,
    )


@pytest.fixture(scope="module")
def pseudo_labelled(corpus, tmp_path_factory):
    """The folder that pseudo_label.py left, and what it printed."""
    source = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    encoder = ECAPA_TDNN(80, channels=[16, 16, 16, 16, 48], lin_neurons=32)
    torch.save(encoder.state_dict(), source / "embedding_model.ckpt")
    classifier = Classifier(32, out_neurons=7)
    torch.save(classifier.state_dict(), source / "classifier.ckpt")
    (source / "hyperparams.yaml").write_text(HYPERPARAMS)
    folder = tmp_path_factory.mktemp("pseudo")
    printed = run_example(
        "pseudo_labels/pseudo_label.py",
        folder,
        f"--data_folder={corpus}/wav",
        f"--encoder_source={source}",
        "--n_clusters=4",
        "--min_seconds=1.2",
        "--dev_share=0.2",
        "--new_extractor={num_workers: 0}",
    )
    return folder, printed


def rows(path):
    """A csv file as a list of dicts."""
    with open(path, newline="", encoding="utf-8") as source:
        return list(csv.DictReader(source))


def test_a_folder_gets_pseudo_labels(pseudo_labelled):
    """All long utterances, each in one of two csv files of one form."""
    folder, printed = pseudo_labelled
    listed = {row["ID"]: row for row in rows(folder / "manifest.csv")}
    train, dev = rows(folder / "train.csv"), rows(folder / "dev.csv")
    named = [row["ID"] for row in train + dev]
    long = [n for n, r in listed.items() if float(r["duration"]) >= 1.2]
    assert len(set(named)) == len(named) and set(named) == set(long)
    assert 0 < len(long) < len(listed) and dev
    speakers = {row["spk_id"] for row in train}
    assert {row["spk_id"] for row in dev} <= speakers
    assert f"--out_n_neurons={len(speakers)}." in printed
    for row in train + dev:
        assert {**row, "spk_id": ""} == {**listed[row["ID"]], "spk_id": ""}


def train_loss(corpus, pseudo, output, *options):
    """The training loss of the supervised example's only epoch."""
    speakers = {row["spk_id"] for row in rows(pseudo / "train.csv")}
    output.mkdir()
    run_example(
        "noisy_labels/train.py",
        output,
        f"--data_folder={corpus}/wav",
        f"--train_annotation={pseudo}/train.csv",
        f"--valid_annotation={pseudo}/dev.csv",
        f"--out_n_neurons={len(speakers)}",
        "--number_of_epochs=1",
        "--batch_size=8",
        "--sentence_len=0.5",
        "--embedding_model={channels: [16, 16, 16, 16, 48]}",
        "--dataloader_options={num_workers: 0}",
        "--noprogressbar",
        *options,
    )
    log = (output / "train_log.txt").read_text()
    assert "lr: 1.00e-03" in log  # the yaml's, in the first epoch
    (loss,) = re.findall(r"train loss: (\S+) - valid loss: \S+, valid Err", log)
    return float(loss)


def test_supervised_recipe_trains_on_them_through_the_gate(
    corpus, pseudo_labelled, tmp_path
):
    """The half of lowest losses has a lower one than all together."""
    folder, _ = pseudo_labelled
    gated = train_loss(
        corpus, folder, tmp_path / "gated", "--gate={share: 0.5}"
    )
    ungated = train_loss(
        corpus,
        folder,
        tmp_path / "ungated",
        "--gate=!new:lgl_plugin.nnet.gates.NoGate",
    )
    assert 0 < gated < ungated


def test_a_yaml_builds_every_piece():
    """Each class that a recipe can use is named, and each entry works."""
    text = (EXAMPLES / "pieces.yaml").read_text(encoding="utf-8")
    pieces = load_hyperpyyaml(text)
    named = set(re.findall(r"!(?:new|name):lgl_plugin\.\w+\.\w+\.(\w+)", text))
    bases = {"Gate", "KMeans", "Clustering"}
    for module in (losses, gates, kmeans, two_step, average):
        for name, kind in inspect.getmembers(module, inspect.isclass):
            own = kind.__module__ == module.__name__
            if own and not name.startswith("_") and name not in bases:
                assert name in named, name
    embeddings = torch.randn(8, 192)
    cosines = pieces["classifier"](embeddings[:, None])[:, 0]
    found = pieces["aam"](cosines, torch.arange(8))
    built = [piece for piece in pieces.values() if isinstance(piece, Gate)]
    assert len(built) == 6
    for gate in built:
        mask = gate(found)
        assert pieces["gated_mean"](found, mask).isfinite()
        corrected = pieces["correct_labels"](
            torch.arange(8), cosines, mask > 0.5
        )
        assert corrected.shape == (8,)
    pieces["contrastive"](embeddings, pieces["gradient_reversal"](embeddings))
    pieces["adversarial_loss"](e1=embeddings, e2=embeddings, e3=embeddings)
    assert pieces["augment"](torch.randn(4, 8000)).shape == (4, 8000)
    assert pieces["encoder"](torch.randn(2, 8000)).shape == (2, 192)
    assert pieces["extractor"].encoder is pieces["encoder"]


def test_an_encoder_of_another_package_is_taken(tmp_path, monkeypatch, corpus):
    """Resemblyzer's, without the weights of its training's loss."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "any_encoder"))
    dvector = importlib.import_module("dvector")
    torch.manual_seed(0)
    network = dvector.DVector()
    weights = {**network.state_dict(), "similarity_weight": torch.ones(1)}
    torch.save({"model_state": weights}, tmp_path / "pretrained.pt")
    folder = tmp_path / "dvector"
    script = EXAMPLES / "any_encoder" / "dvector.py"
    run_script(script, tmp_path / "pretrained.pt", folder)

    path = next(corpus.rglob("*.wav"))
    wav = read_audio(path)[None]
    extract = load_extractor(folder, "cpu")
    with torch.inference_mode():
        found = extract.encoder(wav)
        expected = network(dvector.Mels(16000)(wav))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("samples", [9000, 25599, 25600, 44800, 56000, 65432])
def test_the_windows_are_resemblyzers(samples, monkeypatch):
    """As its compute_partial_slices has them, at 1.3 a second."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "any_encoder"))
    dvector = importlib.import_module("dvector")
    torch.manual_seed(0)
    network = dvector.DVector(dim=8, n_layers=1)
    frames = 1 + samples // 160
    mels = torch.rand(1, frames, 40)
    starts = list(range(0, max(1, frames - 160 + 77 + 1), 77))
    if len(starts) > 1 and samples / 160 - starts[-1] < 0.75 * 160:
        starts.pop()
    windows = [mels[:, start : start + 160] for start in starts]
    missing = 160 - windows[-1].shape[1]
    windows[-1] = torch.nn.functional.pad(windows[-1], (0, 0, 0, missing))
    found = [
        torch.nn.functional.normalize(
            network.linear(network.lstm(window)[0][:, -1]).relu()
        )
        for window in windows
    ]
    torch.testing.assert_close(network(mels), torch.stack(found).mean(0))
