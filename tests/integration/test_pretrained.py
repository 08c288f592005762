"""Stage II, and the verbs, from an encoder that the yaml does not name."""

import numpy as np
import torch
from speechbrain.lobes.models.Xvector import Xvector
from tiny import STAGE2, TINY, train_here

from lgl_plugin.cli.main import main
from lgl_plugin.inference.export import export_checkpoint
from lgl_plugin.inference.extractor import load_extractor
from lgl_plugin.runs.plain import plain_settings
from lgl_plugin.runs.pretrained import build_encoder

SETTINGS = """
sample_rate: 16000
new_encoder: !name:lgl_plugin.nnet.encoders.Encoder
    features: !name:speechbrain.lobes.features.Fbank {n_mels: 24}
    network: !name:speechbrain.lobes.models.Xvector.Xvector
        in_channels: 24
        tdnn_channels: [8, 8, 8, 8, 24]
        lin_neurons: 12
"""


def test_stage2_trains_an_xvector_and_exports_it(corpus, tmp_path, monkeypatch):
    torch.manual_seed(0)
    settings, weights = plain_settings(SETTINGS), tmp_path / "mine.ckpt"
    network = build_encoder(settings).network
    torch.save(network.state_dict(), weights)
    export_checkpoint(weights, settings, tmp_path / "mine")
    # The folder says what encoder it is.
    own = [o for o in TINY if not o.startswith("--new_encoder")]
    monkeypatch.setattr("tiny.TINY", own)
    run, given = tmp_path / "run", f"--pretrained_encoder={tmp_path}/mine"
    options = (given, *STAGE2, "--n_iterations=1")
    train_here("small_stage2.yaml", corpus, run, *options)
    before = (run / "state.json").read_bytes()
    train_here("small_stage2.yaml", corpus, run, *options)
    assert (run / "state.json").read_bytes() == before
    exported = run / "export" / "iter1"
    trained = load_extractor(exported).encoder.network
    assert isinstance(trained, Xvector)
    assert any(
        not torch.equal(value, network.state_dict()[name])
        for name, value in trained.state_dict().items()
    )
    embed = ["embed", str(exported), str(corpus / "wav"), str(tmp_path / "v")]
    main([*embed, "--device=cpu"])
    assert np.load(tmp_path / "v" / "vectors.npy").shape[1] == 12
