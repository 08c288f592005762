"""Exported folders: weights, yaml, card and threshold. See also
tests/integration/test_export_folder.py, where SpeechBrain alone loads them."""

import json
import pathlib
import shutil
import zipfile
from html.parser import HTMLParser
from unittest import mock

import numpy as np
import pytest
import soundfile
import tiny_speech
import torch
import yaml
from huggingface_hub import ModelCard
from hyperpyyaml import load_hyperpyyaml, resolve_references
from markdown_it import MarkdownIt
from speechbrain.inference.speaker import SpeakerRecognition
from speechbrain.lobes.features import Fbank
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN, Classifier
from speechbrain.lobes.models.Xvector import Xvector

from lgl_plugin.cli.main import main
from lgl_plugin.dataio.labels import write_labels
from lgl_plugin.dataio.manifest import load_manifest
from lgl_plugin.inference import export as exporting
from lgl_plugin.inference.backends import Whitening
from lgl_plugin.inference.calibration import find_threshold
from lgl_plugin.inference.export import (
    InferenceModel,
    export,
    export_checkpoint,
    read_trained_step,
)
from lgl_plugin.inference.extractor import load_extractor
from lgl_plugin.inference.model_card import model_card
from lgl_plugin.metrics.error_rates import eer
from lgl_plugin.nnet.encoders import Encoder
from lgl_plugin.nnet.losses import SubCentreClassifier
from lgl_plugin.runs.plain import dump_settings, plain_settings
from lgl_plugin.runs.settings import load_settings, read_preset
from lgl_plugin.runs.weights import load_weights
from lgl_plugin.utils.files import checksum

ONNX_EXPORT = "lgl_plugin.inference.onnx_export"

ROOT = pathlib.Path(__file__).parents[2]
WIDTH = {"channels": [8, 8, 8, 8, 24], "attention_channels": 4}
WIDTH |= {"input_size": 24, "lin_neurons": 6}
TAG = "!name:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN"
N = 8


def encoder_settings(**other):
    """Of a narrow ECAPA-TDNN."""
    features = "!name:speechbrain.lobes.features.Fbank"
    normalise = "!name:speechbrain.processing.features.InputNormalization"
    options = {"norm_type": "sentence", "std_norm": False}
    return {
        "!name:lgl_plugin.nnet.encoders.Encoder": {
            "features": {features: {"n_mels": 24}},
            "normalise": {normalise: options},
            "network": {TAG: {**WIDTH, **other}},
        }
    }


def stage_settings(folder, stage):
    """What a stage's yaml says, as far as it matters here."""
    return {
        "stage": stage,
        "seed": 1,
        "data_folder": str(folder / 'a: "b" | c'),
        "train_folder": str(folder / 'a: "b" | c'),
        "manifest": None,
        "verification_file": str(folder / "trials #1.txt"),
        "held_out_share": 0.5,
        "n_iterations": 2,
        "sample_rate": 16000,
        "new_encoder": encoder_settings(),
        "new_last_encoder": encoder_settings(dilations=[1, 2, 3, 3, 1]),
        "new_classifier": {
            "!name:speechbrain.lobes.models.ECAPA_TDNN.Classifier": {
                "input_size": 6
            }
        },
        "lr": "1e-3",
    }


def save_step(folder, classes=0):
    """Weights as a step leaves them."""
    folder.mkdir(parents=True)
    encoder = ECAPA_TDNN(**WIDTH)
    torch.save(encoder.state_dict(), folder / "embedding_model.ckpt")
    if classes:
        classifier = Classifier(6, out_neurons=classes)
        torch.save(classifier.state_dict(), folder / "classifier.ckpt")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of both stages with its audio, made by hand."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    audio = folder / 'a: "b" | c'
    audio.mkdir()
    rng = np.random.default_rng(0)
    rows = ["ID,duration,wav,start,stop,spk_id"]
    for n in range(N):
        wav = rng.normal(size=16000) * (1 + np.sin(np.arange(16000) / (n + 9)))
        soundfile.write(audio / f"{n}.wav", wav / 20, 16000)
        rows.append(f"{n}.wav,1.0,$data_root/{n}.wav,0,16000,")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    done = ["baselines", "stage1"]
    save_step(folder / "stage1")
    for name in ("iter1", "iter2"):
        for phase in ("classifier", "gated"):
            save_step(folder / name / phase, classes=2)
            done.append(f"{name}/{phase}")
        (folder / name / "labels").mkdir()
        labels = torch.arange(N) % 2
        ids = [f"{n}.wav" for n in range(N)]
        write_labels(folder / name / "labels" / "labels.csv", ids, labels)
    state = {
        "settings": {
            "stage 2": stage_settings(folder, 2),
            "stage 1": stage_settings(folder, 1),
        },
        "done": dict.fromkeys(done, {}),
        **{name: {} for name in ("inputs", "sources", "failed", "files")},
    }
    (folder / "state.json").write_text(json.dumps(state))
    records = [
        {"stage": 1, "phase": "after simclr", "eer": 20.0},
        {"stage": 2, "iteration": 1, "phase": "after gated", "eer": 12.345},
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The first iteration's end."""
    folder = tmp_path_factory.mktemp("exported")
    export(run, "iter1/gated", folder)
    return folder


def front_matter(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def test_weights_fit_the_yaml_strictly(run, exported):
    text = (exported / "hyperparams.yaml").read_text()
    built = load_hyperpyyaml(text)
    weights = torch.load(exported / "embedding_model.ckpt", weights_only=True)
    built["embedding_model"].load_state_dict(weights, strict=True)
    source = run / "iter1" / "gated" / "embedding_model.ckpt"
    for name, value in torch.load(source, weights_only=True).items():
        assert torch.equal(weights[name], value)
    assert "lgl_plugin" not in text


def test_threshold_and_mean_are_those_of_the_model(run, exported):
    """Against SpeechBrain's own embeddings, one by one."""
    model = SpeakerRecognition.from_hparams(source=str(exported))
    paths = sorted((run / 'a: "b" | c').iterdir())
    vectors = torch.cat(
        [
            model.encode_batch(torch.tensor(soundfile.read(path)[0])[None])[0]
            for path in paths
        ]
    )
    names = load_manifest(run / "manifest.csv", "").ids
    assert list(names) == [path.name for path in paths]
    _, aside = exporting.held_out(N, 0.5, 1)
    unit = torch.nn.functional.normalize(vectors)
    scores, same = [], []
    for first in range(N):
        for second in range(first):
            if first in aside or second in aside:
                scores.append(float(unit[first] @ unit[second]))
                same.append(first % 2 == second % 2)
    assert model.hparams.threshold == pytest.approx(eer(scores, same)[1], 1e-4)
    wav = torch.tensor(soundfile.read(paths[0])[0])[None]
    centred = model.encode_batch(wav, normalize=True)[0]
    assert torch.allclose(centred, vectors[:1] - vectors.mean(0), atol=1e-4)


@pytest.fixture
def with_backend(run):
    """The end of the first iteration, with the back-end of a phase."""
    rng = np.random.default_rng(0)
    backend = Whitening(0.5).fit(rng.normal(size=(40, 6)) + 0.3)
    path = run / "iter1" / "gated" / "backend.npz"
    backend.save(path)
    yield backend
    path.unlink()


def test_speechbrain_alone_applies_the_back_end(run, with_backend, tmp_path):
    """Network, back-end and cosine, at several lengths of speech."""
    bare, whole = tmp_path / "bare", tmp_path / "whole"
    export(run, "iter1/gated", bare)
    export(run, "iter1/gated", whole, backend=True)
    assert "lgl_plugin" not in (whole / "hyperparams.yaml").read_text()
    paths = sorted((run / 'a: "b" | c').iterdir())
    wavs = [torch.tensor(soundfile.read(path)[0]) for path in paths]
    batch = torch.stack(wavs[:2])
    batch[1, 8000:] = 0
    lengths = torch.tensor([1.0, 0.5])
    first, then = (
        SpeakerRecognition.from_hparams(source=str(folder))
        for folder in (bare, whole)
    )
    vectors = first.encode_batch(batch, lengths)[:, 0].numpy()
    found = then.encode_batch(batch, lengths)[:, 0].numpy()
    expected = with_backend(vectors)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found / scale, expected / scale, atol=1e-5)

    # The threshold is of these cosines, and ours are the same.
    manifest = load_manifest(run / "manifest.csv", paths[0].parent)
    ours = load_extractor(whole)(manifest, np.arange(N))[0].vectors
    theirs = torch.stack([then.encode_batch(wav[None])[0, 0] for wav in wavs])
    np.testing.assert_allclose(ours / scale, theirs.numpy() / scale, atol=1e-4)
    hparams = load_hyperpyyaml((whole / "hyperparams.yaml").read_text())
    threshold = (hparams["threshold"], "pseudo-labels")
    pseudo = read_trained_step(run, "iter1/gated").pseudo
    extract = load_extractor(whole)
    again, _ = find_threshold(extract, manifest, 0.5, 1, pseudo)
    assert again == (pytest.approx(threshold[0], abs=1e-5), threshold[1])

    # Stage II starts from the bare network, and nothing is classified.
    load_weights(ECAPA_TDNN(**WIDTH), whole / "embedding_model.ckpt")
    assert not (whole / "classifier.ckpt").exists()
    card = (whole / "README.md").read_text()
    assert "a back-end, fitted without labels" in " ".join(card.split())
    assert "back-end" not in (bare / "README.md").read_text()


def test_the_yaml_says_whether_the_back_end_is_part(
    run, with_backend, tmp_path
):
    state = (run / "state.json").read_text()
    given = json.loads(state)
    tag = "!new:lgl_plugin.inference.backends.Whitening"
    given["settings"]["stage 2"]["backend"] = {tag: ""}
    try:
        (run / "state.json").write_text(json.dumps(given))
        for options, there in (([], True), (["--backend=none"], False)):
            folder = tmp_path / str(there)
            main(
                ["export", str(run), "iter1/gated", f"--output={folder}"]
                + ["--threshold=0.3", *options]
            )
            assert (folder / "backend.ckpt").exists() is there
        with pytest.raises(FileNotFoundError, match="--backend=none"):
            export(run, "iter1/classifier", tmp_path / "none", threshold=0.0)
    finally:
        (run / "state.json").write_text(state)


@torch.no_grad()
def test_a_network_without_lengths_takes_a_back_end(run, tmp_path):
    """Ours embeds each utterance of a batch as if it were alone."""
    settings = stage_settings(tmp_path, 1)
    ((_, parts),) = settings["new_encoder"].items()
    xvector = "!name:speechbrain.lobes.models.Xvector.Xvector"
    options = {"in_channels": 24, "lin_neurons": 6}
    parts["network"] = {xvector: options}
    torch.save(Xvector(**options).state_dict(), tmp_path / "mine.ckpt")
    backend = Whitening(1.0).fit(np.random.default_rng(0).normal(size=(20, 6)))
    bare, whole = (
        InferenceModel(settings, tmp_path / "mine.ckpt", backend=behind)
        for behind in (None, backend)
    )
    whole.save(tmp_path / "whole", "library_name: speechbrain\n")
    theirs = SpeakerRecognition.from_hparams(source=str(tmp_path / "whole"))
    wav = torch.randn(1, 16000) / 9
    padded = torch.cat([wav, torch.zeros(1, 8000)], 1)
    for model in (whole.extractor(), load_extractor(tmp_path / "whole")):
        embed = model.encoder.eval()
        expected = backend(bare.extractor().encoder.eval()(wav).numpy())
        scale = np.abs(expected).max()
        for found in (
            embed(wav).numpy(),
            embed(padded, torch.tensor([2 / 3])).numpy(),
            theirs.encode_batch(wav)[:, 0].numpy(),
        ):
            # Its pooling adds noise, which whitening makes larger.
            np.testing.assert_allclose(
                found / scale, expected / scale, atol=3e-3
            )


class Means(torch.nn.Module):
    """A network that takes features alone, as those of other packages do."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(24, 6)

    def forward(self, features):
        return self.linear(features.mean(dim=1))


def test_speechbrain_loads_a_network_that_takes_no_lengths(run, tmp_path):
    """It hands lengths over whether or not the network wants any."""
    settings = stage_settings(tmp_path, 1)
    ((_, parts),) = settings["new_encoder"].items()
    parts["network"] = {f"!name:{__name__}.Means": {}}
    torch.manual_seed(0)
    network = Means()
    torch.save(network.state_dict(), tmp_path / "mine.ckpt")
    model = InferenceModel(settings, tmp_path / "mine.ckpt")
    model.save(tmp_path / "bare", "library_name: speechbrain\n")
    wav = torch.randn(1, 16000) / 9
    theirs = SpeakerRecognition.from_hparams(source=str(tmp_path / "bare"))
    encoder = load_extractor(tmp_path / "bare").encoder.eval()
    with torch.no_grad():
        expected = network(encoder.normalised(encoder.features(wav)))
        for found in (encoder(wav), theirs.encode_batch(wav)):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_weights_of_a_folder_are_no_encoder_without_it(run, tmp_path):
    """They would be scored without the back-end beside them."""
    settings = stage_settings(tmp_path, 1)
    weights = run / "stage1" / "embedding_model.ckpt"
    export_checkpoint(weights, settings, tmp_path / "out")
    with pytest.raises(ValueError, match="is one part .* name its folder"):
        load_extractor(tmp_path / "out" / "embedding_model.ckpt")


def test_arguments_of_a_network_may_be_a_list(run, tmp_path):
    settings = stage_settings(tmp_path, 1)
    ((_, parts),) = settings["new_encoder"].items()
    parts["network"] = {
        "!name:speechbrain.lobes.models.Xvector.Xvector": ["cpu"]
    }
    torch.save(Xvector("cpu").state_dict(), tmp_path / "mine.ckpt")
    model = InferenceModel(settings, tmp_path / "mine.ckpt")
    assert model.parts["embedding_model"] == {
        "!new:speechbrain.lobes.models.Xvector.Xvector": {"device": "cpu"}
    }


def test_card_holds_no_path_and_parses(run, exported):
    card = ModelCard.load(exported / "README.md")
    assert card.data.license == "other"
    assert card.data.library_name == "speechbrain"
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("eer", 12.345)
    assert result.dataset_name == "trials #1.txt"
    text = (exported / "README.md").read_text()
    text += (exported / "hyperparams.yaml").read_text()
    assert str(run) not in text and str(run.parent) not in text
    assert '`a: "b" | c`' in text  # of the paths, the last name
    assert '| data_folder | a: "b" \\| c |' in text
    assert "| **iteration 1, gated** | 12.3 |" in text


def test_card_of_stage1_shows_nothing_of_stage2(run, tmp_path):
    export(run, "stage1", tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "**Stage I**" in text and "| iteration 1, gated |" not in text
    assert "<summary>Stage II<" not in text
    assert "halves of utterances" in " ".join(text.split())
    assert not (tmp_path / "classifier.ckpt").exists()


def test_given_threshold_needs_no_audio(run, tmp_path):
    found = export(
        run,
        folder=tmp_path,
        data_folder="nowhere",
        threshold=0.4,
        licence="cc-by-4.0",
    )
    assert found == {"threshold": 0.4}
    hparams = load_hyperpyyaml((tmp_path / "hyperparams.yaml").read_text())
    assert hparams["threshold"] == 0.4
    assert front_matter(tmp_path)["license"] == "cc-by-4.0"


@pytest.fixture
def moved(run, tmp_path):
    """Settings on record name a list that is elsewhere now; with its place."""
    copy, listed = tmp_path / "run", tmp_path / "elsewhere.csv"
    shutil.copytree(run, copy)
    state = json.loads((copy / "state.json").read_text())
    state["settings"]["stage 2"]["manifest"] = str(tmp_path / "mine.csv")
    (copy / "manifest.csv").rename(listed)
    state["inputs"] = {"stage 2": {"manifest": checksum(listed)}}
    (copy / "state.json").write_text(json.dumps(state))
    return copy, listed


def test_a_list_that_has_moved_is_named(run, moved, tmp_path):
    copy, listed = moved
    with pytest.raises(FileNotFoundError, match="If it has moved"):
        export(copy)
    found = export(copy, folder=tmp_path / "a", manifest=listed)
    assert found == export(run, folder=tmp_path / "b")
    # None is needed for a threshold that is given.
    assert export(copy, threshold=0.4) == {"threshold": 0.4}
    with listed.open("a") as out:
        out.write("9.wav,1.0,$data_root/0.wav,0,16000,\n")
    with pytest.raises(ValueError, match="not the list that .* trained on"):
        export(copy, manifest=listed)


def test_labelled_utterances_are_not_taken_for_held_out(run, tmp_path):
    """Training pulled them together: their pairs make a threshold too high."""
    of_labels = run / "iter1" / "labels" / "labels.json"
    _, before = exporting.held_out(N, 0.5, 1)
    labelled = [f"{row}.wav" for row in before[:3]]
    seen = []

    def find(*given):
        seen.append(given[-1])
        return None, np.zeros((1, 6), np.float32)

    of_labels.write_text(json.dumps({"labelled": labelled}))
    try:
        with mock.patch.object(exporting, "find_threshold", find):
            for name in ("iter1", "iter2", "stage1"):
                export(run, name, tmp_path / name)
    finally:
        of_labels.unlink()
    assert [rows.tolist() for rows in seen] == [before[:3].tolist(), [], []]


@pytest.mark.parametrize(
    "step, options, place",
    [
        (None, {}, "iter2"),
        ("iter2/classifier", {}, "iter2-classifier"),
        # Training would write iter2 again, without the user's choices.
        (None, {"threshold": 0.0}, "iter2-custom"),
        (None, {"licence": "mit"}, "iter2-custom"),
    ],
)
def test_places_of_a_run(run, step, options, place):
    find = mock.Mock(return_value=((0.0, "halves"), np.zeros((1, 2))))
    with (
        mock.patch.object(InferenceModel, "save") as save,
        mock.patch.object(exporting, "find_threshold", find),
    ):
        export(run, step, **options)
    assert save.call_args[0][0] == run / "export" / place


def test_another_export_with_choices_is_not_replaced_without_a_word(
    run, tmp_path, monkeypatch
):
    """The second call has no licence, and the first one's is lost."""
    folder = tmp_path / "mine"
    logger = mock.Mock()
    monkeypatch.setattr(exporting, "logger", logger)
    export(run, None, folder, threshold=0.5, licence="mit")
    logger.warning.assert_not_called()
    export(run, None, folder, threshold=0.4)
    assert "is replaced" in logger.warning.call_args[0][0]


def test_a_round_alone_means_its_latest_encoder(run):
    assert read_trained_step(run, "iter1").name == "iter1/gated"
    assert read_trained_step(run).name == "iter2/gated"


def test_a_step_that_was_done_again_is_no_later_one(run, tmp_path):
    """It is last in the run's record then."""
    again = shutil.copytree(run, tmp_path / "run")
    state = json.loads((run / "state.json").read_text())
    for name in ("iter2/classifier", "iter1/classifier"):
        state["done"][name] = state["done"].pop(name)
    (again / "state.json").write_text(json.dumps(state))
    assert read_trained_step(again, "iter1").short_name == "iter1"
    found = read_trained_step(again)
    assert (found.name, found.short_name) == ("iter2/gated", "iter2")
    early = read_trained_step(again, "iter1/classifier")
    assert early.short_name == "iter1-classifier"


@pytest.mark.parametrize("step, last", [("iter1", 1), ("iter2/gated", 3)])
def test_the_last_iteration_has_its_own_encoder(run, tmp_path, step, last):
    export(run, step, tmp_path, threshold=0.0)
    hparams = plain_settings((tmp_path / "hyperparams.yaml").read_text())
    ((_, arguments),) = hparams["embedding_model"].items()
    assert arguments.get("dilations", [0, 0, 0, 1])[3] == last


def test_a_ceiling_has_the_settings_of_stage_2(run, tmp_path):
    ceiling = shutil.copytree(run, tmp_path / "run")
    save_step(ceiling / "ceiling")
    state = json.loads((run / "state.json").read_text())
    state["settings"].pop("stage 1")  # of an encoder from elsewhere
    state["done"] = {"ceiling": {}}
    (ceiling / "state.json").write_text(json.dumps(state))
    found = read_trained_step(ceiling)
    assert (found.name, found.short_name) == ("ceiling", "ceiling")
    assert [*found.settings] == ["stage 2"] and found.pseudo is None
    export(ceiling, threshold=0.0)
    card = (ceiling / "export" / "ceiling-custom" / "README.md").read_text()
    assert "with their speakers' names, which were trained on" in card


def test_checkpoint_of_no_run_loses_its_wrappers(run, tmp_path):
    weights = torch.load(
        run / "stage1" / "embedding_model.ckpt", weights_only=True
    )
    wrapped = {f"module._orig_mod.{n}": v for n, v in weights.items()}
    torch.save(wrapped, tmp_path / "wrapped.ckpt")
    source = tmp_path / "mine.yaml"
    source.write_text(dump_settings(stage_settings(tmp_path, 2)))
    folder = tmp_path / "out"
    main(
        [
            "export",
            str(tmp_path / "wrapped.ckpt"),
            f"--yaml={source}",
            f"--output={folder}",
        ]
    )
    found = torch.load(folder / "embedding_model.ckpt", weights_only=True)
    assert found.keys() == weights.keys()
    assert "threshold" not in load_hyperpyyaml(
        (folder / "hyperparams.yaml").read_text()
    )
    assert "No decision threshold" in (folder / "README.md").read_text()


def test_an_average_of_a_step_is_exported_beside_it(run):
    """Such as `lgl export --average=2` leaves below the step."""
    average = run / "iter1" / "gated" / "average2"
    average.mkdir()
    for path in (run / "iter1" / "gated").glob("*.ckpt"):
        shutil.copy(path, average)
    try:
        main(["export", str(run), "iter1/gated/average2", "--threshold=0.3"])
    finally:
        shutil.rmtree(average)
    folder = run / "export" / "iter1-gated-average2-custom"
    assert "threshold: 0.3" in (folder / "hyperparams.yaml").read_text()
    card = (folder / "README.md").read_text()
    assert "was not scored by itself" in card
    assert load_extractor(folder).encoder is not None


def test_onnx_is_written_into_the_exported_folder(run, tmp_path, monkeypatch):
    """Of a run's step and of weights alone; the writing is tested apart."""
    written = []
    for module in ("lgl_plugin.inference.export", ONNX_EXPORT):
        monkeypatch.setattr(
            f"{module}.export_onnx", lambda *paths: written.append(paths)
        )
    monkeypatch.setattr(f"{ONNX_EXPORT}.check_onnx", lambda: None)
    source = tmp_path / "mine.yaml"
    source.write_text(dump_settings(stage_settings(tmp_path, 2)))
    weights = str(run / "stage1" / "embedding_model.ckpt")
    for words in (
        [weights, f"--yaml={source}"],
        [str(run), "stage1", "--threshold=0.0"],
    ):
        out = tmp_path / str(len(written))
        main(["export", *words, f"--output={out}", "--onnx"])
        assert (out / "hyperparams.yaml").exists()
        assert [*map(pathlib.Path, written[-1])] == [out, out / "encoder.onnx"]


def test_nothing_of_an_earlier_export_stays(run, tmp_path):
    export(run, "iter1/gated", tmp_path)
    (tmp_path / "encoder.onnx").touch()
    (tmp_path / "notes.txt").touch()
    export(run, "iter1/gated", tmp_path, licence="mit")
    assert (tmp_path / "encoder.onnx").exists()  # of the same encoder
    (tmp_path / "backend.ckpt").touch()
    export(run, "stage1", tmp_path, threshold=0.0)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        *("README.md", "embedding_model.ckpt", "hyperparams.yaml"),
        "notes.txt",
    ]


@pytest.mark.parametrize("name", ["README.md", "hyperparams.yaml"])
def test_files_of_a_project_are_not_replaced(run, tmp_path, name):
    (tmp_path / name).write_text("my project")
    with pytest.raises(FileExistsError, match=f"{name} is of no exported"):
        export(run, "stage1", tmp_path, threshold=0.3)
    assert [*tmp_path.iterdir()] == [tmp_path / name]


@pytest.mark.parametrize("place", ["a", "a/speaker", "run/stage1", "run"])
def test_recordings_and_other_runs_are_left_alone(run, tmp_path, place):
    """Also by an export of weights."""
    other, audio = tmp_path / "run", tmp_path / "a"
    shutil.copytree(run, other)
    shutil.copytree(run / 'a: "b" | c', audio / "speaker")
    words = "is of the run|holds recordings|has other folders, such as speaker"
    with pytest.raises(FileExistsError, match=words):
        export(run, "stage1", tmp_path / place, threshold=0.3)
    weights = run / "stage1" / "embedding_model.ckpt"
    settings = stage_settings(run, 1)
    with pytest.raises(FileExistsError, match=words):
        export_checkpoint(weights, settings, tmp_path / place)
    export(other, "stage1", other / "export" / "mine", threshold=0.3)
    with pytest.raises(FileExistsError, match="is of the run"):
        export(other, "iter1", other / "stage1", threshold=0.3)


def test_a_recording_in_an_exported_folder_is_an_example(run, tmp_path):
    export(run, "stage1", tmp_path, threshold=0.3)
    shutil.copy(run / 'a: "b" | c' / "0.wav", tmp_path)
    export(run, "stage1", tmp_path, threshold=0.3)


def test_a_folder_that_cannot_be_written_shows_before_the_search(
    run, tmp_path, monkeypatch
):
    (tmp_path / "mine").touch()
    monkeypatch.setattr(exporting, "find_threshold", pytest.fail)
    with pytest.raises(OSError, match="a file is in the folder's place"):
        export(run, "stage1", tmp_path / "mine" / "out")


@pytest.mark.parametrize(
    "option",
    [
        "stage1",
        "--backend=fitted",
        "--data_folder=there",
        "--manifest=a.csv",
        "--device=cpu",
    ],
)
def test_weights_take_no_options_of_a_run(run, tmp_path, capsys, option):
    weights = run / "stage1" / "embedding_model.ckpt"
    words = ["export", str(weights), option, f"--output={tmp_path}/out"]
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert f"{option} is an option for a run" in capsys.readouterr().err


def test_an_average_has_no_back_end(run, tmp_path, capsys, monkeypatch):
    """The refusal comes before anything is averaged."""
    words = ["export", str(run), "iter1/gated", "--average=2"]

    def refused(*options):
        with pytest.raises(SystemExit, match="2"):
            main([*words, *options])
        return capsys.readouterr().err

    assert "--backend=none" in refused("--backend=fitted")
    assert "checkpoints of 0 epochs" in refused()
    state = json.loads((run / "state.json").read_text())
    tag = "!new:lgl_plugin.inference.backends.Whitening"
    state["settings"]["stage 2"]["backend"] = {tag: ""}
    (tmp_path / "state.json").write_text(json.dumps(state))
    words[1] = str(tmp_path)
    assert "--backend=none" in refused()
    assert "checkpoints of 0 epochs" in refused("--backend=none")


def test_sub_centres_name_the_same_pseudo_speakers(run, tmp_path):
    torch.manual_seed(1)
    classify = SubCentreClassifier(6, 5, n_centres=3)
    torch.save(classify.state_dict(), tmp_path / "classifier.ckpt")
    model = InferenceModel(
        stage_settings(tmp_path, 2),
        run / "iter1" / "gated" / "embedding_model.ckpt",
        tmp_path / "classifier.ckpt",
    )
    model.save(tmp_path / "out", "# card")
    loaded = SpeakerRecognition.from_hparams(source=str(tmp_path / "out"))
    embeddings = torch.randn(50, 1, 6)
    best = loaded.mods.classifier(embeddings)[:, 0].argmax(dim=-1)
    named = loaded.hparams.label_encoder.decode_torch(best)
    expected = classify(embeddings)[:, 0].argmax(dim=-1).tolist()
    assert named == [f"pseudo-speaker {n}" for n in expected]


def test_an_encoder_without_normalisation(run, tmp_path):
    settings = stage_settings(tmp_path, 1)
    ((_, parts),) = settings["new_encoder"].items()
    del parts["normalise"]
    weights = run / "stage1" / "embedding_model.ckpt"
    export_checkpoint(weights, settings, tmp_path / "out")
    loaded = SpeakerRecognition.from_hparams(source=str(tmp_path / "out"))
    encoder = Encoder(Fbank(n_mels=24), ECAPA_TDNN(**WIDTH)).eval()
    load_weights(encoder.network, weights)
    wav = torch.randn(1, 16000)
    with torch.no_grad():
        expected = encoder(wav)
    found = loaded.encode_batch(wav)[:, 0]
    assert torch.allclose(found, expected, atol=1e-4)


PRESETS = sorted((ROOT / "hparams").glob("*stage[12].yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_settings_survive_as_yaml(path, tmp_path):
    given = "data_folder: x"
    if "speech_model" in read_preset(path):
        given += f"\nspeech_model: {tiny_speech.save(tmp_path)}"
    settings = plain_settings(load_settings(path, given)[1])
    assert plain_settings(dump_settings(settings)) == settings


@pytest.mark.parametrize(
    "width, kind", [(512, "new_encoder"), (1024, "new_last_encoder")]
)
def test_verification_yaml_has_the_encoders_of_stage2(width, kind):
    recipe = ROOT / "recipes" / "VoxCeleb" / "LGL"
    path = recipe / "verification" / "verification_ecapa.yaml"
    overrides = {"data_folder": "x", "pretrain_path": "y", "width": width}
    with open(path, encoding="utf-8") as source:
        text = resolve_references(source, overrides).getvalue()
    verification = plain_settings(text)
    _, text = load_settings(ROOT / "hparams/stage2.yaml", "data_folder: x")
    ((_, parts),) = plain_settings(text)[kind].items()
    assert [*verification["embedding_model"].values()] == [
        *parts["network"].values()
    ]


def test_card_breaks_no_table_and_no_front_matter():
    settings = {"stage 1": {"sample_rate": 8000, "gate": "a|b", "x": None}}
    text = model_card(settings, "ECAPA_TDNN", licence="x: [y")
    assert "| gate | a\\|b |" in text
    assert yaml.safe_load(text.split("---\n")[1])["license"] == "x: [y"


class Tags(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


def test_no_name_can_write_into_the_card():
    """Of a data folder, a trial list, a setting, a phase or a licence."""

    def card(name):
        own = {"sample_rate": 8000, "data_folder": name, name: [name]}
        text = model_card(
            {"stage 1": {**own, "verification_file": name}},
            "ECAPA_TDNN",
            "stage1",
            data={"name": name, "utterances": 9, "held_out": 2, "hours": 1.0},
            rows={"Stage I": {"eer": 20.0}, f"iteration 1, {name}": {"eer": 9}},
            licence=name,
        )
        front, body = text.split("---\n", 2)[1:]
        assert yaml.safe_load(front)["license"] == name
        reader = MarkdownIt("commonmark").enable("table")
        return Tags(reader.render(body))

    hostile = "<script>alert(1)<b>| `x` [y](javascript:z) ![i](j)\\| --- \\"
    harmless, found = card("harmless"), card(hostile)
    assert found.tags == harmless.tags and "script" not in found.tags
    assert hostile in found.text


def test_errors_name_what_is_wrong(run, tmp_path):
    def says(*arguments):
        with pytest.raises((FileNotFoundError, ValueError)) as caught:
            export(*arguments)
        return str(caught.value)

    assert "is it the output_folder of a run" in says(tmp_path)
    assert "iter1/classifier, iter1/gated" in says(run, "iter7/gated")
    assert "say where by --data_folder" in says(
        run, "stage1", tmp_path, "cpu", "nowhere"
    )
    narrow = stage_settings(tmp_path, 1)
    del narrow["new_last_encoder"]
    narrow["new_encoder"] = encoder_settings(lin_neurons=7)
    weights = run / "stage1" / "embedding_model.ckpt"
    with pytest.raises(ValueError, match="does not fit the ECAPA_TDNN"):
        export_checkpoint(weights, narrow, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    alien = {**narrow, "new_encoder": {TAG: WIDTH}}
    with pytest.raises(ValueError, match="ECAPA_TDNN cannot be exported"):
        export_checkpoint(weights, alien, tmp_path / "out")
    (tmp_path / "torn.ckpt").write_bytes(b"torn")
    one = torch.ones(1)
    for number, alien in enumerate([{"w": "text"}, {3: one}, [one]]):
        torch.save(alien, path := tmp_path / f"{number}.ckpt")
        with pytest.raises(ValueError, match="ckpt is no state dict"):
            export_checkpoint(path, narrow, tmp_path / "out")
    # Torch's own words, in colours, tell how to run the code in there.
    torch.save(torch.nn.Linear(1, 1), tmp_path / "code.ckpt")
    for name in ("torn.ckpt", "code.ckpt"):
        with pytest.raises(ValueError, match="cut off, or holds more") as said:
            export_checkpoint(tmp_path / name, narrow, tmp_path / "out")
        assert "\x1b" not in str(said.value)


def test_a_checkpoint_that_inflates_is_refused(run, tmp_path):
    """torch.load would read it: a thousand times its size."""
    torch.save({"w": torch.zeros(10**6)}, tmp_path / "whole.ckpt")
    path = tmp_path / "bomb.ckpt"
    with (
        zipfile.ZipFile(tmp_path / "whole.ckpt") as whole,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for name in whole.namelist():
            out.writestr(name, whole.read(name))
    settings = stage_settings(tmp_path, 1)
    with pytest.raises(ValueError, match="bomb.ckpt cannot be read.*its arr"):
        export_checkpoint(path, settings, tmp_path / "out")
    with pytest.raises(ValueError, match="bomb.ckpt cannot be read.*its arr"):
        load_weights(torch.nn.Linear(2, 3), path)


def test_command_says_it_without_a_traceback(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["export", str(tmp_path)])
    assert caught.value.code == 2
    assert "output_folder of a run" in capsys.readouterr().err


def test_an_encoders_folder_is_no_run(exported, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(exported), f"--output={tmp_path}/out"])
    assert "is an encoder's folder already" in capsys.readouterr().err


def test_a_gpu_that_is_absent_is_said_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(tmp_path), "--device=cuda"])
    assert "--device=cuda: torch" in capsys.readouterr().err
