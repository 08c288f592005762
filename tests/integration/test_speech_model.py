"""Stage II with a pre-trained speech model: trained, stopped, exported."""

import shutil

import numpy as np
import pytest
import tiny_speech
import torch
from speechbrain.inference.speaker import EncoderClassifier
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
from tiny import STAGE2, TINY, train_here

from lgl_plugin.inference.extractor import load_extractor
from lgl_plugin.runs.metrics_log import read_metrics
from lgl_plugin.runs.weights import read_tensors
from lgl_plugin.training.loss_gated import LossGatedBrain

NARROW = "channels: [16, 16, 16, 16, 48], attention_channels: 16"
NETWORK = f"train: layers, lr_scale: 0.1, decay: 0.5, head: {{{NARROW}}}"
WEIGHTS = "embedding_model.ckpt"


def test_trained_stopped_resumed_and_exported(corpus, tmp_path, monkeypatch):
    torch.manual_seed(0)
    source = tiny_speech.save(tmp_path / "model", hidden_dropout=0.1)
    first = ECAPA_TDNN(
        80, channels=[16] * 4 + [48], attention_channels=16, lin_neurons=192
    )
    torch.save(first.state_dict(), tmp_path / "first.ckpt")
    own = [o for o in TINY if not o.startswith("--new_encoder")]
    monkeypatch.setattr("tiny.TINY", own)
    options = (
        f"--speech_model={source}",
        f"--new_encoder={{network: {{{NETWORK}}}}}",
        f"--new_first_encoder={{network: {{{NARROW}}}}}",
        f"--pretrained_encoder={tmp_path}/first.ckpt",
        *(*STAGE2[1:4], "--n_iterations=1", "--anchor=0.1"),
        *("--ckpt_interval_steps=1", "--ckpt_interval_minutes=0"),
    )
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train_here("small_ssl_stage2.yaml", corpus, whole, *options)

    # In the middle of the gated phase's only epoch.
    step = LossGatedBrain.fit_batch

    def broken(brain, batch):
        if brain.step == 3 and brain.epochs_before:
            raise RuntimeError("the power is cut")
        return step(brain, batch)

    with monkeypatch.context() as patch:
        patch.setattr(LossGatedBrain, "fit_batch", broken)
        with pytest.raises(RuntimeError, match="the power is cut"):
            train_here("small_ssl_stage2.yaml", corpus, stopped, *options)
    train_here("small_ssl_stage2.yaml", corpus, stopped, *options)
    start = read_tensors(whole / "start.ckpt")
    for phase in ("classifier", "gated"):
        trained = read_tensors(whole / "iter1" / phase / WEIGHTS)
        again = read_tensors(stopped / "iter1" / phase / WEIGHTS)
        assert trained.keys() == again.keys() == start.keys()
        for name, value in trained.items():
            assert torch.equal(value, again[name]), name
        moved = {n for n in start if not torch.equal(trained[n], start[n])}
        assert any(name.startswith("head.") for name in moved)
        layers = {name for name in moved if name.startswith("front.")}
        assert layers
        assert all(name.startswith("front.encoder.layers.") for name in layers)
        # Frozen weights are in the phase's own file alone.
        folder = stopped / "iter1" / phase / "checkpoints"
        for path in folder.glob(f"*/{WEIGHTS}"):
            rest = start.keys() - read_tensors(path).keys()
            assert rest and not rest & moved
            assert all(name.startswith("front.") for name in rest)
    lr = [record["lr"] for record in read_metrics(whole) if "lr" in record]
    assert lr == [1e-3] * 2  # the head's

    # Neither the model's folder nor a network is asked for.
    shutil.rmtree(source)
    exported = whole / "export" / "iter1"
    assert str(tmp_path) not in (exported / "hyperparams.yaml").read_text()
    classifier = EncoderClassifier.from_hparams(
        source=str(exported), savedir=str(exported)
    )
    wavs = torch.randn(2, 8000) / 9
    wavs[1, 6000:] = 0
    lengths = torch.tensor([1.0, 0.75])
    encoder = load_extractor(exported).encoder.eval()
    with torch.no_grad():
        expected = encoder(wavs, lengths)
    found = classifier.encode_batch(wavs, lengths)[:, 0]
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-5)
