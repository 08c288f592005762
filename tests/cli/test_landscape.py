"""lgl landscape: the page of a small run folder, made by hand."""

import copy
import csv
import errno
import json
import os
import shutil
import tempfile

import numpy as np
import pytest
import soundfile
import torch
from speechbrain.lobes.models.ECAPA_TDNN import Classifier

from lgl_plugin.cli.main import main
from lgl_plugin.dataio.labels import write_labels
from lgl_plugin.dataio.manifest import held_out
from lgl_plugin.methods.dino import DINO
from lgl_plugin.methods.moco import MoCo
from lgl_plugin.methods.simclr import SimCLR
from lgl_plugin.nnet.losses import AAMSoftmax
from lgl_plugin.report.probes import ProbedRun
from lgl_plugin.runs.plain import plain_settings
from lgl_plugin.runs.pretrained import build_encoder
from lgl_plugin.runs.weights import load_weights, save_weights

SETTINGS = """
stage: 2
seed: 1
sample_rate: 16000
crop_seconds: 0.2
held_out_share: 0.1
n_iterations: 1
manifest: null
pretrained_encoder: null
new_last_encoder: null
new_encoder: !name:lgl_plugin.nnet.encoders.Encoder
    features: !name:speechbrain.lobes.features.Fbank {n_mels: 8}
    network: !name:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN
        input_size: 8
        channels: [8, 8, 8, 8, 8]
        attention_channels: 4
        res2net_scale: 2
        se_channels: 4
        lin_neurons: 6
new_classifier: !name:speechbrain.lobes.models.ECAPA_TDNN.Classifier
    input_size: 6
aam: !new:lgl_plugin.nnet.losses.AAMSoftmax {margin: 0.2, scale: 30}
"""
N, CLUSTERS = 12, 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Stage I and a round, of random weights; the gate let a half through."""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    ids = [f"{n}.wav" for n in range(N)]
    rows = ["ID,duration,wav,start,stop,spk_id"]
    for name in ids:
        soundfile.write(folder / name, 0.1 * rng.normal(size=8000), 16000)
        rows.append(f"{name},0.5,$data_root/{name},0,8000,")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    settings = plain_settings(SETTINGS) | {"data_folder": str(folder)}
    done = {name: {} for name in ("stage1", "iter1/classifier", "iter1/gated")}
    done["iter1/labels"] = {"n_clusters": CLUSTERS}
    state = {"settings": {"stage 1": {}, "stage 2": settings}, "done": done}
    state |= {name: {} for name in ("inputs", "sources", "failed", "files")}
    (folder / "state.json").write_text(json.dumps(state))
    labels = np.arange(N) % CLUSTERS
    write_labels(folder / "iter1" / "labels" / "labels.csv", ids, labels)
    centroids = rng.normal(size=(CLUSTERS, 6)).astype(np.float32)
    np.save(folder / "iter1" / "labels" / "centroids.npy", centroids)
    torch.manual_seed(0)
    for step in ("stage1", "iter1/classifier", "iter1/gated"):
        encoder = build_encoder(settings)
        save_weights(encoder.network, folder / step / "embedding_model.ckpt")
        save_weights(
            Classifier(6, out_neurons=CLUSTERS),
            folder / step / "classifier.ckpt",
        )
    np.savez(
        folder / "iter1" / "gated" / "gate.npz",
        rows=np.arange(N),
        losses=np.zeros(N),
        selected=np.arange(N) < N // 2,
        corrected=np.where(np.arange(N) == N - 1, 0, -1),
        tau=1.0,
    )
    return folder


def test_the_page_and_its_numbers(run, tmp_path, capsys):
    out = tmp_path / "out"
    options = [f"--output_folder={out}", "--points=3", "--utterances=11"]
    main(["landscape", str(run), "--device=cpu", *options])
    assert capsys.readouterr().out.count("curvature") == 3
    steps = json.loads((out / "landscape.json").read_text())["steps"][run.name]
    assert list(steps) == ["iter1/start", "iter1/classifier", "iter1/gated"]
    with open(out / "surfaces.csv", newline="") as source:
        header, *rows = csv.reader(source)
    assert len(rows) == 3 * 3 * 3
    centres = {row[0]: row[3:] for row in rows if row[1:3] == ["0", "0"]}
    for name, values in centres.items():
        np.testing.assert_allclose(
            np.float64(values), steps[name]["loss"], rtol=1e-4
        )
    with open(out / "lines.csv", newline="") as source:
        lines = list(csv.reader(source))[1:]
    ends = {(row[0], row[1], row[2]): float(row[3]) for row in lines}
    for one, other in (("start", "classifier"), ("classifier", "gated")):
        one, other = f"iter1/{one}", f"iter1/{other}"
        end = ends[one, other, "1"]
        assert end == pytest.approx(steps[other]["loss"][0], rel=1e-4)
    # The classifier is another one at the start of the second line only.
    start = ends["iter1/classifier", "iter1/gated", "0"]
    assert start == pytest.approx(
        steps["iter1/classifier"]["loss"][0], rel=1e-4
    )
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "could not be made" not in page and page.count("<figure>") == 4


def test_the_loss_is_that_of_the_encoder_and_of_what_the_gate_let_through(run):
    """Against the modules called by hand, by the kept batch statistics."""
    probed = ProbedRun(run, 11, seed=0)
    (probe,) = probed.probes(["iter1/gated"], "cpu", by_batch=False)
    encoder = build_encoder(probed.settings).eval()
    load_weights(encoder.network, run / "iter1/gated/embedding_model.ckpt")
    classifier = Classifier(6, out_neurons=CLUSTERS)
    load_weights(classifier, run / "iter1/gated/classifier.ckpt")
    rows = probed.rows
    with torch.no_grad():
        cosines = classifier(encoder(probe.crops)[:, None])[:, 0]
        every, own = probe.figures().tolist()
    labels = torch.from_numpy(rows % CLUSTERS)
    aam = AAMSoftmax(0.2, 30.0)
    assert every == pytest.approx(float(aam(cosines, labels).mean()), rel=1e-5)
    labels[torch.from_numpy(rows == N - 1)] = 0  # corrected
    counted = torch.from_numpy((rows < N // 2) | (rows == N - 1))
    expected = aam(cosines, labels)[counted].mean()
    assert own == pytest.approx(float(expected), rel=1e-5)
    parts = sum(part() for part in probe.parts()).detach()
    assert parts.item() == pytest.approx(own, rel=1e-5)
    shift = 30 * np.sin(0.2)
    at_chance = shift + np.log(np.exp(-shift) + CLUSTERS - 1)
    assert probe.chance() == pytest.approx(at_chance, rel=1e-4)


def test_what_a_user_labelled_is_of_the_sample(run):
    """It was trained on, where chance alone would have held it out."""
    _, aside = held_out(N, 0.1, 1)
    left = run / "iter1" / "labels" / "labels.json"
    left.write_text(json.dumps({"labelled": [f"{aside[0]}.wav"]}))
    try:
        assert aside[0] in ProbedRun(run, N, 0).rows
    finally:
        left.unlink()
    assert aside[0] not in ProbedRun(run, N, 0).rows


def test_a_bad_utterance_is_named_and_passed_over(run, tmp_path, capsys):
    there = shutil.copytree(run, tmp_path / "run")
    state = json.loads((run / "state.json").read_text())
    state["settings"]["stage 2"]["data_folder"] = str(there)
    (there / "state.json").write_text(json.dumps(state))

    def probes():
        return ProbedRun(there, 11, 0).probes(["iter1/start"], "cpu", False)

    (whole,) = probes()
    probed = ProbedRun(there, 11, 0)
    lost = probed.rows[4]
    (there / f"{lost}.wav").write_bytes(b"not audio")
    (probe,) = probed.probes(["iter1/start"], "cpu", False)
    kept = np.arange(len(whole.labels)) != 4
    assert torch.equal(probe.crops, whole.crops[kept])
    assert torch.equal(probe.labels, whole.labels[kept])
    assert torch.equal(probe.trained_on, whole.trained_on[kept])
    assert f"the first: {lost}.wav cannot be read" in capsys.readouterr().out
    for path in there.glob("*.wav"):
        path.write_bytes(b"not audio")
    with pytest.raises(ValueError, match="cannot be read; the first: "):
        [*probes()]


def test_only_weights_that_were_trained_are_moved(run):
    probed = ProbedRun(run, 11, 0)
    probed.settings = probed.settings | {"trained_weights": "^fc"}
    for probe in probed.probes(probed.names(), "cpu", False):
        encoder = dict(probe.model["encoder"].network.named_parameters())
        moved = [n for n, w in encoder.items() if w.requires_grad]
        assert len(probe.parameters) == len(moved) < len(encoder)
        assert all(name.startswith("fc") for name in moved)


def test_batch_statistics_leave_the_kept_ones_alone(run):
    (probe,) = ProbedRun(run, 11, 0).probes(["iter1/gated"], "cpu", True)
    before = {k: v.clone() for k, v in probe.model.state_dict().items()}
    with torch.no_grad():
        by_batch = probe.figures()
        probe.use_batch_norm(by_batch=False)
        assert not torch.allclose(by_batch, probe.figures(), atol=1e-3)
    for name, value in probe.model.state_dict().items():
        assert "num_batches" in name or torch.equal(value, before[name])


@pytest.mark.parametrize(
    "options, message",
    [
        (["--only", "iter2/gated"], "has no step iter2/gated. It has iter1/st"),
        (["--points=4"], "--points=4: it must be odd"),
        *(
            ([f"--radius={radius}"], f"--radius={radius}: it must be above 0")
            for radius in ("0.0", "-1.0", "nan", "inf")
        ),
        (["--utterances=0"], "--utterances=0: it must be 2 or more"),
    ],
)
def test_wrong_calls_are_refused(run, capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        main(["landscape", str(run), *options])
    assert message in capsys.readouterr().err


def test_a_sample_without_any_that_counted_is_refused_before_the_work(
    run, tmp_path, capsys
):
    """It was found out behind the steps before, whose figures were lost."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    path = folder / "iter1" / "gated" / "gate.npz"
    order = ProbedRun(folder, 2, 0).order
    chosen = np.arange(N) == order[6]
    none = np.full(N, -1)
    np.savez(path, **{**np.load(path), "selected": chosen, "corrected": none})
    call = ["landscape", str(folder), "--points=3", "--seed=0"]
    call += [f"--output_folder={tmp_path / 'page'}", "--device=cpu"]
    with pytest.raises(SystemExit, match="2"):
        main([*call, "--utterances=3"])
    said = capsys.readouterr()
    assert "of 3 utterances none counted in the last epoch of" in said.err
    assert "or give --utterances=7 or more" in said.err
    assert not said.out and not (tmp_path / "page").exists()
    main([*call, "--utterances=7"])
    np.savez(path, **{**np.load(path), "selected": chosen & False})
    with pytest.raises(SystemExit, match="2"):
        main(call)
    assert "gated: leave iter1/gated out by --only\n" in capsys.readouterr().err


def state_of(run, folder):
    """A run's state, to change, and its manifest, in another folder."""
    (folder / "manifest.csv").write_text((run / "manifest.csv").read_text())
    return json.loads((run / "state.json").read_text())


def test_a_page_that_cannot_be_written_is_refused_before_the_work(
    run, tmp_path, monkeypatch, capsys
):
    def refuse(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(ProbedRun, "probes", lambda *_: pytest.fail("work"))
    with pytest.raises(SystemExit, match="1"):
        main(["landscape", str(run), f"--output_folder={tmp_path}"])
    assert "Make it writable" in capsys.readouterr().err


def test_an_encoder_of_another_kind_is_no_start(run, tmp_path):
    state = state_of(run, tmp_path)
    stage2 = state["settings"]["stage 2"]
    stage2["new_first_encoder"] = stage2["new_encoder"]
    (tmp_path / "state.json").write_text(json.dumps(state))
    for name in ("stage1", "iter1"):
        (tmp_path / name).symlink_to(run / name)
    names = ProbedRun(tmp_path, 11, seed=0).names()
    assert names == ["iter1/classifier", "iter1/gated"]


def test_a_phase_that_lacked_utterances_is_passed_over(run, tmp_path):
    """It is on record as done, so that it is not tried at each start."""
    state = state_of(run, tmp_path)
    state["done"]["iter1/large_margin"] = {}
    (tmp_path / "state.json").write_text(json.dumps(state))
    (tmp_path / "iter1").symlink_to(run / "iter1")
    assert "iter1/large_margin" not in ProbedRun(tmp_path, 11, seed=0).names()


@pytest.mark.parametrize("method", [SimCLR, MoCo, DINO])
def test_stage1_has_the_loss_of_its_method(run, tmp_path, capsys, method):
    """Of a run without Stage II; against the method called by hand."""
    state = state_of(run, tmp_path)
    settings = state["settings"]["stage 2"] | {"embedding_size": 6}
    tag = f"!name:{method.__module__}.{method.__name__}"
    small = {"n_prototypes": 6, "hidden_size": 8, "bottleneck_size": 4}
    settings["method"] = {tag: small if method is DINO else None}
    state["settings"] = {"stage 1": settings}
    state["done"] = {"stage1": {}}
    (tmp_path / "state.json").write_text(json.dumps(state))
    encoder = build_encoder(settings)
    torch.manual_seed(0)
    made = method(encoder, 6, N, **(small if method is DINO else {}))
    save_weights(encoder.network, tmp_path / "stage1" / "embedding_model.ckpt")
    save_weights(made, tmp_path / "stage1" / "method.ckpt")
    main(["landscape", str(tmp_path), "--points=3", "--utterances=9"])
    assert "stage1: loss" in capsys.readouterr().out
    found = tmp_path / "report" / "landscape" / "landscape.json"
    (steps,) = json.loads(found.read_text())["steps"].values()
    assert list(steps) == ["stage1"] and steps["stage1"]["counted"] == 9
    opened = ProbedRun(tmp_path, 9, 0)
    (probe,) = opened.probes(["stage1"], "cpu", False)
    # MoCo's queue knows utterances by their rows in the manifest.
    assert probe.rows.tolist() == opened.rows.tolist() != [*range(9)]
    before = copy.deepcopy(made.state_dict())
    assert probe.crops.shape == (9, 2, 3200)
    figures = [probe.figures() for _ in range(2)]
    assert torch.equal(*figures)
    assert steps["stage1"]["loss"] == pytest.approx(figures[0].tolist())
    for key, value in probe.model["method"].state_dict().items():
        assert torch.equal(value, before[key])
    if method is SimCLR:
        made.eval(), encoder.eval()
        with torch.no_grad():
            one, other = (encoder(crops) for crops in probe.crops.unbind(1))
            views = [torch.stack([one, other, other])]
            expected, _ = made(views, [], torch.arange(9).expand(2, -1), 1.0)
        assert figures[0][0].item() == pytest.approx(float(expected), rel=1e-4)


def test_a_run_without_labels_yet_is_refused(run, tmp_path, capsys):
    state = state_of(run, tmp_path) | {"done": {}}
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(SystemExit, match="2"):
        main(["landscape", str(tmp_path)])
    assert "has no step that can be probed yet" in capsys.readouterr().err


def test_a_folder_without_stage_2_is_refused(tmp_path, capsys):
    names = ("settings", "done", "inputs", "sources", "failed", "files")
    state = {name: {} for name in names}
    (tmp_path / "state.json").write_text(json.dumps(state))
    for folder, message in (
        (tmp_path, "is of no training"),
        (tmp_path / "x", "no state"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["landscape", str(folder)])
        assert message in capsys.readouterr().err
