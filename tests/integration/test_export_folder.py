"""SpeechBrain alone loads an exported folder, with no network."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from speechbrain.lobes.features import Fbank
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
from speechbrain.processing.features import InputNormalization

from lgl_plugin.cli.main import main
from lgl_plugin.dataio.manifest import Manifest
from lgl_plugin.inference.extractor import Extractor
from lgl_plugin.nnet.encoders import Encoder

# In an isolated interpreter (no current folder, no PYTHON* variables) that
# finds no lgl_plugin, installed or not.
LOAD = """
import json, os, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lgl_plugin":
            raise ImportError("lgl_plugin is not installed here")

sys.meta_path.insert(0, Blocker())
os.environ["HF_HUB_OFFLINE"] = "1"
from speechbrain.inference.classifiers import EncoderClassifier
from speechbrain.inference.speaker import SpeakerRecognition

wav, *rest = sys.argv[1:]
for folder, card in zip(rest[::2], rest[1::2]):
    found = {}
    for kind in (SpeakerRecognition, EncoderClassifier):
        model = kind.from_hparams(source=folder, savedir=folder + "_loaded")
        embedding = model.encode_batch(model.load_audio(wav)[None])
        found[kind.__name__] = embedding[0, 0].tolist()
    if hasattr(model.hparams, "label_encoder"):
        found["class"] = model.classify_file(wav)[3]
    place = {}
    exec(card, place)
    found["score"], found["same"] = place["score"].item(), place["same"].item()
    found["threshold"] = place["model"].hparams.threshold
    names = [name for name in sys.modules if name.split(".")[0] == "lgl_plugin"]
    found["plugin"] = names
    print(json.dumps(found))
"""
STEPS = ("stage1", "iter2/gated")


@pytest.fixture(scope="module")
def paths(corpus):
    """Two files."""
    return sorted(map(str, (corpus / "wav").rglob("*.wav")))[:2]


@pytest.fixture(scope="module")
def loaded(run, paths, tmp_path_factory):
    """Embeddings of the two files by SpeechBrain alone, for each step."""
    top, given = tmp_path_factory.mktemp("exported"), []
    for step in STEPS:
        folder = top / step.replace("/", "_")
        main(["export", str(run), step, f"--output={folder}"])
        card = (folder / "README.md").read_text()
        code = re.search("```python\n(.*?)```", card, re.DOTALL)[1]
        assert len([line for line in code.splitlines() if line]) == 5
        # As a reader would fill it in.
        code = code.replace("path/of/this/folder", str(folder))
        for name, path in zip(("1.wav", "2.wav"), paths):
            code = code.replace(f'"{name}"', repr(path))
        given += [str(folder), code]
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOAD, paths[0], *given],
        cwd=top,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = done.stdout.splitlines()[-len(STEPS) :]
    return dict(zip(STEPS, map(json.loads, found)))


@pytest.mark.parametrize("step", STEPS)
def test_folder_loads_without_the_plugin(run, paths, loaded, step):
    found = loaded[step]
    assert found["plugin"] == []

    # What the training process embeds with.
    state = json.loads((run / "state.json").read_text())
    (parts,) = state["settings"]["stage 2"]["new_encoder"].values()
    (arguments,) = parts["network"].values()
    encoder = Encoder(
        Fbank(n_mels=80),
        ECAPA_TDNN(**arguments),
        InputNormalization(norm_type="sentence", std_norm=False),
    )
    weights = run / step / "embedding_model.ckpt"
    encoder.network.load_state_dict(torch.load(weights, weights_only=True))
    extract = Extractor(encoder)
    manifest = Manifest.of(
        (path, path, 0.0, soundfile.info(path).duration, "") for path in paths
    )
    ours = extract(manifest, [0, 1])[0].vectors_of(paths)
    for kind in ("SpeakerRecognition", "EncoderClassifier"):
        np.testing.assert_allclose(found[kind], ours[0], rtol=0, atol=1e-5)
    unit = ours / np.linalg.norm(ours, axis=1, keepdims=True)
    assert found["score"] == pytest.approx(unit[0] @ unit[1], abs=1e-5)
    assert found["same"] == (found["score"] > found["threshold"])
    if step != "stage1":
        assert found["class"][0].startswith("pseudo-speaker ")
