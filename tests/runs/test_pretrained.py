"""Encoders that say what they are, and Stage II's settings with them."""

import functools
import pathlib
import sys

import pytest
import tiny_speech
import torch
from speechbrain.lobes.features import Fbank
from speechbrain.lobes.models.ResNet import ResNet
from speechbrain.lobes.models.Xvector import Xvector

from lgl_plugin.inference.backends import Whitening
from lgl_plugin.inference.export import InferenceModel, export_checkpoint
from lgl_plugin.inference.extractor import load_extractor
from lgl_plugin.nnet.campplus import CAMPPlus
from lgl_plugin.nnet.encoders import Encoder
from lgl_plugin.nnet.features import KaldiFbank
from lgl_plugin.nnet.speech_model import SpeechModel
from lgl_plugin.runs.pretrained import (
    build_encoder,
    embedding_size,
    encoder_files,
    encoder_settings,
)
from lgl_plugin.runs.settings import load_settings, without_helpers

HPARAMS = pathlib.Path(__file__).parents[2] / "recipes/VoxCeleb/LGL/hparams"
# In the form of SpeechBrain's repositories at the Hugging Face Hub.
HUB = """
pretrained_path: speechbrain/spkrec-mine-voxceleb
n_mels: 24
sample_rate: 16000
out_n_neurons: 7205
compute_features: !new:speechbrain.lobes.features.Fbank
    n_mels: !ref <n_mels>
mean_var_norm: !new:speechbrain.processing.features.InputNormalization
    norm_type: sentence
    std_norm: False
{network}
classifier: !new:speechbrain.lobes.models.ECAPA_TDNN.Classifier
    input_size: 12
    out_neurons: !ref <out_n_neurons>
modules:
    compute_features: !ref <compute_features>
    mean_var_norm: !ref <mean_var_norm>
    embedding_model: !ref <embedding_model>
    classifier: !ref <classifier>
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        embedding_model: !ref <embedding_model>
    paths:
        embedding_model: !ref <pretrained_path>/embedding_model.ckpt
"""
XVECTOR = """
embedding_model: !new:speechbrain.lobes.models.Xvector.Xvector
    in_channels: !ref <n_mels>
    activation: !name:torch.nn.LeakyReLU
    tdnn_channels: [8, 8, 8, 8, 24]
    lin_neurons: 12
"""
RESNET = """
embedding_model: !new:speechbrain.lobes.models.ResNet.ResNet
    input_size: !ref <n_mels>
    channels: [4, 4, 8, 8]
    lin_neurons: 12
"""
NETWORKS = {
    XVECTOR: functools.partial(
        Xvector, in_channels=24, tdnn_channels=[8, 8, 8, 8, 24], lin_neurons=12
    ),
    RESNET: functools.partial(
        ResNet, 24, channels=[4, 4, 8, 8], lin_neurons=12
    ),
}


def hub_folder(folder, network):
    """A folder of SpeechBrain's, and its encoder made by hand."""
    folder.mkdir()
    (folder / "hyperparams.yaml").write_text(HUB.format(network=network))
    torch.manual_seed(0)
    module = NETWORKS[network]()
    torch.save(module.state_dict(), folder / "embedding_model.ckpt")
    return module.eval()


def stage2(*options, yaml="small_stage2"):
    text = "data_folder: /x\n" + "\n".join(options)
    return load_settings(HPARAMS / f"{yaml}.yaml", text)


@torch.no_grad()
@pytest.mark.parametrize("network", NETWORKS, ids=["xvector", "resnet"])
def test_a_folder_of_speechbrains_says_what_it_is(tmp_path, network):
    module = hub_folder(tmp_path / "mine", network)
    settings = encoder_settings(tmp_path / "mine")
    encoder = build_encoder(settings).eval()
    encoder.network.load_state_dict(module.state_dict())
    waveform = torch.randn(1, 16000) / 9
    features = Fbank(n_mels=24)(waveform)
    features = features - features.mean(dim=1, keepdim=True)
    expected = module(features).flatten(1)
    loaded = load_extractor(tmp_path / "mine").encoder.eval()
    for found in (encoder(waveform), loaded(waveform)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert embedding_size(settings) == 12


@pytest.mark.parametrize(
    "sizes",
    [
        {"growth_rate": 2, "embedding_size": 512, "feat_dim": 40},
        {"growth_rate": 8, "bn_size": 2, "init_channels": 16},
    ],
)
def test_weights_of_campplus_say_their_sizes(tmp_path, sizes):
    torch.manual_seed(0)
    network, path = CAMPPlus(**sizes), tmp_path / "mine.pt"
    torch.save(network.state_dict(), path)
    settings = encoder_settings(path)
    assert embedding_size(settings) == sizes.get("embedding_size", 192)
    loaded = load_extractor(path).encoder
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[name], value)
    assert isinstance(loaded.features, KaldiFbank)
    assert encoder_files(path) == {"embedding_model.ckpt": path}


@torch.no_grad()
def test_an_exported_folder_says_what_it_was_made_of(tmp_path):
    """With the back-end, which embeddings have; bare, as Stage II trains."""
    torch.manual_seed(0)
    path = tmp_path / "mine.pt"
    network = CAMPPlus(80, 12, growth_rate=4, init_channels=8)
    torch.save(network.state_dict(), path)
    settings = encoder_settings(path)
    export_checkpoint(path, settings, tmp_path / "bare")
    assert encoder_settings(tmp_path / "bare") == settings
    assert "the package `lgl_plugin`" in (
        tmp_path / "bare" / "README.md"
    ).read_text(encoding="utf-8")
    backend = Whitening().fit(torch.randn(50, 12).numpy())
    model = InferenceModel(settings, path, backend=backend)
    model.save(tmp_path / "whole", "card")
    assert encoder_settings(tmp_path / "whole", bare=True) == settings
    waveforms = torch.randn(2, 16000) / 9
    bare, whole = (
        load_extractor(tmp_path / name).encoder.eval()(waveforms)
        for name in ("bare", "whole")
    )
    torch.testing.assert_close(
        whole, torch.from_numpy(backend(bare.numpy())), rtol=1e-4, atol=1e-4
    )
    assert len(encoder_files(tmp_path / "whole")) == 3


def test_other_files_and_folders_say_nothing(tmp_path):
    assert encoder_settings(tmp_path / "missing") is None
    assert encoder_settings(tmp_path) is None
    # As a run keeps Stage I: the recipe's yaml beside the weights.
    (tmp_path / "hyperparams.yaml").write_text("stage: 1\nnew_encoder: 2\n")
    assert encoder_settings(tmp_path) is None
    path = tmp_path / "weights.pt"
    for content in (Xvector(in_channels=24).state_dict(), [1], {}):
        torch.save(content, path)
        assert encoder_settings(path) is None
        with pytest.raises(ValueError, match="what network .* CAM.*--yaml"):
            load_extractor(path)
    path.write_bytes(b"no weights")
    assert encoder_settings(path) is None


def test_half_a_campplus_is_refused_in_words(tmp_path):
    weights = CAMPPlus().state_dict()
    weights.pop("head.conv1.weight")
    torch.save(weights, tmp_path / "mine.pt")
    with pytest.raises(ValueError, match="does not fit the CAMPPlus"):
        load_extractor(tmp_path / "mine.pt")


# Stage II


@pytest.mark.parametrize("yaml", ["small_stage2", "stage2"])
def test_stage2_takes_the_pretrained_encoder_as_its_own(tmp_path, yaml):
    module = hub_folder(tmp_path / "mine", XVECTOR)
    given = f"pretrained_encoder: {tmp_path}/mine"
    settings, text = stage2(given, yaml=yaml)
    encoder = settings.new_encoder()
    assert isinstance(encoder, Encoder) and encoder is not (
        settings.new_encoder()
    )
    encoder.network.load_state_dict(module.state_dict())
    assert settings.embedding_size == 12
    assert settings.new_classifier(out_neurons=3).weight.shape == (3, 12)
    # The yaml that a run keeps says so without the folder.
    kept = tmp_path / "kept.yaml"
    text = without_helpers(text)
    kept.write_text(text.replace(f"{tmp_path}/mine", "null"))
    assert load_settings(kept)[0].embedding_size == 12


def test_stage2_takes_campplus(tmp_path):
    path = tmp_path / "mine.pt"
    network = CAMPPlus(40, 64, growth_rate=4, init_channels=8)
    torch.save(network.state_dict(), path)
    settings, _ = stage2(f"pretrained_encoder: {path}")
    assert isinstance(settings.new_encoder().network, CAMPPlus)
    assert settings.embedding_size == 64


def test_campplus_keeps_the_features_of_a_yaml_that_names_it(tmp_path):
    path = tmp_path / "mine.pt"
    network = CAMPPlus(40, 64, growth_rate=4, init_channels=8)
    torch.save(network.state_dict(), path)
    given = f"pretrained_encoder: {path}"
    features = "!name:speechbrain.lobes.features.Fbank {n_mels: 40}"
    named = "!name:lgl_plugin.nnet.campplus.CAMPPlus"
    sizes = (
        "{feat_dim: 40, embedding_size: 64, growth_rate: 4, init_channels: 8}"
    )
    own = f"!name:lgl_plugin.nnet.encoders.Encoder {{features: {features}, "
    own += f"network: {named} {sizes}}}"
    settings, _ = stage2(given, f"new_encoder: {own}", "embedding_size: 64")
    assert type(settings.new_encoder().features) is Fbank
    for wrong in ("foo", "[1, 2]"):
        with pytest.raises(ValueError, match="leave new_encoder out"):
            stage2(given, f"new_encoder: {wrong}")


def test_stage2_refuses_what_contradicts_the_pretrained_encoder(tmp_path):
    hub_folder(tmp_path / "mine", XVECTOR)
    given = f"pretrained_encoder: {tmp_path}/mine"
    for option, said in [
        ("new_encoder: {network: {lin_neurons: 3}}", "new_encoder: .*mine"),
        ("embedding_size: 192", r"embedding_size: .*itself \(12\)"),
        ("sample_rate: 8000", r"sample_rate: .*itself \(16000\)"),
    ]:
        with pytest.raises(ValueError, match=said):
            stage2(given, option)
    assert stage2(given, "embedding_size: 12")


def test_stage2_refuses_bands_of_an_encoder_that_it_does_not_make(tmp_path):
    hub_folder(tmp_path / "mine", XVECTOR)
    given = f"pretrained_encoder: {tmp_path}/mine"
    with pytest.raises(ValueError, match="n_mels changes nothing here"):
        stage2(given, "n_mels: 40")
    assert stage2(given, "n_mels: 40", yaml="stage2")  # of the last round's


def test_stage2_refuses_weights_that_do_not_fit(tmp_path):
    """Before a run folder is begun."""
    hub_folder(tmp_path / "mine", XVECTOR)
    weights = tmp_path / "mine" / "embedding_model.ckpt"
    given = f"pretrained_encoder: {weights}"
    with pytest.raises(ValueError, match="does not fit the ECAPA_TDNN"):
        stage2(given)
    torch.save(NETWORKS[RESNET]().state_dict(), weights)
    with pytest.raises(ValueError, match="does not fit the Xvector"):
        stage2(f"pretrained_encoder: {tmp_path}/mine")


@pytest.mark.parametrize("step", ["stage1", "iter1/gated"])
def test_weights_of_a_run_that_do_not_fit_name_its_export(step, tmp_path):
    """The refusal of another width had no remedy."""
    (tmp_path / "export").mkdir()
    export = tmp_path / "export" / step.partition("/")[0]
    hub_folder(export, XVECTOR)
    hub_folder(tmp_path / "export" / "another", RESNET)
    weights = tmp_path / step / "embedding_model.ckpt"
    weights.parent.mkdir(parents=True)
    weights.write_bytes((export / weights.name).read_bytes())
    given = f"pretrained_encoder: {weights}"
    with pytest.raises(ValueError, match=f"--pretrained_encoder={export}$"):
        stage2(given)
    stage2(f"pretrained_encoder: {export}")
    # An export of other weights, as of an encoder that trained on.
    torch.save(NETWORKS[XVECTOR]().state_dict(), export / weights.name)
    with pytest.raises(ValueError) as error:
        stage2(given)
    assert "--pretrained_encoder=" not in str(error.value)


def test_a_folder_of_an_own_class_says_how_to_have_it_found(tmp_path):
    hub_folder(tmp_path / "mine", XVECTOR)
    path = tmp_path / "mine" / "hyperparams.yaml"
    own = path.read_text().replace("speechbrain.lobes.models.X", "my_own_x.X")
    path.write_text(own)
    with pytest.raises(ValueError, match="PYTHONPATH"):
        load_extractor(tmp_path / "mine")
    with pytest.raises(ValueError, match="PYTHONPATH"):
        stage2(f"pretrained_encoder: {tmp_path}/mine")


def test_stage2_refuses_a_folder_that_embeds_nothing(tmp_path):
    hub_folder(tmp_path / "mine", XVECTOR)
    path = tmp_path / "mine" / "hyperparams.yaml"
    path.write_text(path.read_text().replace("Xvector.Xvector", "None.Such"))
    with pytest.raises(ValueError, match="pretrained_encoder: .*mine.*None"):
        stage2(f"pretrained_encoder: {tmp_path}/mine")


def test_a_pretrained_encoder_may_give_the_first_labels_alone(
    tmp_path, monkeypatch
):
    """That which is trained is another, of another size."""
    module = hub_folder(tmp_path / "mine", XVECTOR)
    source = tiny_speech.save(tmp_path / "speech")
    given = (
        f"pretrained_encoder: {tmp_path}/mine",
        f"speech_model: {source}",
    )
    settings, _ = stage2(*given, yaml="small_ssl_stage2")
    first = settings.new_first_encoder().network
    first.load_state_dict(module.state_dict())
    assert isinstance(settings.new_encoder().network, SpeechModel)
    assert settings.new_classifier(out_neurons=3).weight.shape == (3, 192)
    for option, said in [
        ("sample_rate: 8000", "is for audio of 16000 Hz, new_encoder for 8000"),
        ("new_first_encoder: {normalise: null}", "says that itself"),
        ("classifier_init: centroids", "set classifier_init to random"),
    ]:
        with pytest.raises(ValueError, match=said):
            stage2(*given, option, yaml="small_ssl_stage2")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ValueError, match="new_encoder.*pip install transformers"
    ):
        stage2(*given, yaml="small_ssl_stage2")


def test_a_speech_model_hears_its_own_sampling_rate(tmp_path):
    source = tiny_speech.save(tmp_path)
    option, told = f"speech_model: {source}", tmp_path / "preprocessor_config"
    for rate in (16000, 8000):
        for other in {16000, 8000} - {rate}:
            said = f"new_encoder.network: sample_rate: {other} .* the {rate} Hz"
            with pytest.raises(ValueError, match=said):
                stage2(option, f"sample_rate: {other}", yaml="small_ssl_stage2")
        stage2(option, f"sample_rate: {rate}", yaml="small_ssl_stage2")
        told.with_suffix(".json").write_text('{"sampling_rate": 8000}')
