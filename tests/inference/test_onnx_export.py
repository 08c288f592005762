"""Encoders as ONNX files, against torch."""

import functools
import io
import sys
import types

import numpy as np
import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.lobes.features import Fbank
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
from speechbrain.processing.features import STFT, InputNormalization

from lgl_plugin.inference import onnx_export as module
from lgl_plugin.inference.extractor import load_extractor
from lgl_plugin.inference.onnx_export import (
    _kaldi_fbank,
    _make_traceable,
    _stft,
    export_onnx,
)
from lgl_plugin.nnet.campplus import CAMPPlus
from lgl_plugin.nnet.encoders import Encoder
from lgl_plugin.nnet.features import KaldiFbank

FOLDER = """
modules:
    compute_features: !new:speechbrain.lobes.features.Fbank {n_mels: 24}
    mean_var_norm: !new:speechbrain.processing.features.InputNormalization
        norm_type: sentence
    embedding_model: !new:speechbrain.lobes.models.%s
"""
NETWORKS = {
    "ecapa": """ECAPA_TDNN.ECAPA_TDNN
        input_size: 24
        channels: [8, 8, 8, 8, 24]
        attention_channels: 4
        lin_neurons: 6""",
    "xvector": """Xvector.Xvector
        in_channels: 24
        tdnn_channels: [8, 8, 8, 8, 24]
        lin_neurons: 6""",
}


@pytest.mark.parametrize("n_fft", [400, 512])
def test_convolution_is_speechbrains_stft(n_fft):
    stft = STFT(16000, n_fft=n_fft)
    waveform = torch.randn(1, 5000)
    torch.testing.assert_close(
        _stft(stft, waveform), stft(waveform), rtol=1e-4, atol=1e-4
    )


def test_convolution_is_kaldis_fbank():
    fbank, waveform = KaldiFbank(), torch.randn(1, 5000) / 9
    torch.testing.assert_close(
        _kaldi_fbank(fbank, waveform), fbank(waveform), rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_what_is_traced_embeds_as_before():
    norm = functools.partial(InputNormalization, norm_type="sentence")
    network = ECAPA_TDNN(24, channels=[8] * 4 + [24], lin_neurons=6)
    encoder = Encoder(Fbank(n_mels=24), network, norm).eval()
    waveform = torch.randn(1, 9000) / 9
    expected = encoder(waveform)
    _make_traceable(encoder)
    torch.testing.assert_close(encoder(waveform), expected, rtol=0, atol=1e-4)


def test_missing_onnx_is_an_error_that_says_how(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match="pip install onnx onnxruntime"):
        export_onnx(tmp_path, tmp_path / "mine.onnx")


def test_an_encoder_that_fails_on_its_shortest_audio_is_named(
    tmp_path, monkeypatch
):
    """The file was blamed, for nan in both."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is an extra")
    pytest.importorskip("onnx", reason="onnx and onnxruntime are an extra")

    class OfOneSample(torch.nn.Module):
        def forward(self, waveforms):
            return waveforms / (waveforms.shape[1] - 1) * 0

    extract = types.SimpleNamespace(encoder=OfOneSample(), sample_rate=16000)
    monkeypatch.setattr(module, "load_extractor", lambda source: extract)
    said = r"waveform \(1 samples\) is not finite. Give the class .* min_frames"
    with pytest.raises(ValueError, match=said):
        export_onnx("mine", tmp_path / "mine.onnx")
    assert not [*tmp_path.iterdir()]


@torch.no_grad()
@pytest.mark.parametrize("name", [*NETWORKS, "campplus"])
def test_a_file_embeds_as_torch_at_any_length(tmp_path, name, monkeypatch):
    runtime = pytest.importorskip(
        "onnxruntime", reason="onnx and onnxruntime are an extra"
    )
    pytest.importorskip("onnx", reason="onnx and onnxruntime are an extra")
    torch.manual_seed(0)
    if name == "campplus":
        source = tmp_path / "mine.pt"
        # The exporter takes a tenth of a second for each layer.
        blocks = ((2, 1), (2, 2), (1, 2))
        monkeypatch.setattr("lgl_plugin.nnet.campplus.BLOCKS", blocks)
        network = CAMPPlus(24, 6, growth_rate=2, init_channels=4)
        torch.save(network.state_dict(), source)
    else:
        source = tmp_path
        text = FOLDER % NETWORKS[name]
        (source / "hyperparams.yaml").write_text(text)
        network = load_hyperpyyaml(text)["modules"]["embedding_model"]
        torch.save(network.state_dict(), source / "embedding_model.ckpt")
    export_onnx(source, tmp_path / "mine.onnx")
    session = runtime.InferenceSession(str(tmp_path / "mine.onnx"))
    encoder = load_extractor(source).encoder.eval()
    shortest = getattr(encoder, "min_samples", 1)
    facts = {"sample_rate": "16000", "min_samples": str(shortest)}
    assert session.get_modelmeta().custom_metadata_map == facts
    assert session.get_outputs()[0].shape == [1, 6]
    # Under a segment of CAM++ (2 s), a whole one, more; and near silence.
    for n_samples, gain in [
        *((shortest, 1), (16000, 1), (32080, 1), (32400, 1)),
        *((70001, 1), (160000, 1e-3)),
    ]:
        waveform = gain * torch.randn(1, n_samples) / 9
        found = session.run(None, {"waveform": waveform.numpy()})[0]
        expected = encoder(waveform).numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_back_end_is_traced():
    """RMSNorm, which an exported back-end begins with, has no operator."""
    norm = torch.nn.RMSNorm(6, eps=1e-20, elementwise_affine=False)
    vectors = torch.randn(3, 6)
    expected = norm(vectors)
    _make_traceable(norm)
    pytest.importorskip("onnx", reason="onnx and onnxruntime are an extra")
    torch.testing.assert_close(norm(vectors), expected)
    torch.onnx.export(
        norm, (vectors,), io.BytesIO(), dynamo=False, opset_version=17
    )


def test_what_cannot_be_written_is_said_in_a_line(tmp_path, capfd, monkeypatch):
    """Without the graph, 27 kB of it, which torch prints on stdout."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is an extra")
    pytest.importorskip("onnx", reason="onnx and onnxruntime are an extra")
    text = FOLDER % NETWORKS["xvector"]
    (tmp_path / "hyperparams.yaml").write_text(text)
    network = load_hyperpyyaml(text)["modules"]["embedding_model"]
    torch.save(network.state_dict(), tmp_path / "embedding_model.ckpt")
    # So that the Fourier transform stays, which has no operator.
    monkeypatch.setattr(module, "_make_traceable", lambda encoder: None)
    log = torch._C._jit_onnx_log
    said = "cannot be written as ONNX: [^\\[]*STFT.* complex[^\n]*$"
    with pytest.raises(ValueError, match=said):
        export_onnx(tmp_path, tmp_path / "mine.onnx")
    assert not capfd.readouterr().out
    assert torch._C._jit_onnx_log is log
    assert not (tmp_path / "mine.onnx").exists()
