"""Two processes by torchrun, as on two GPUs, but with gloo on the CPU."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import RECIPE, STAGE1, STAGE2, TINY  # of this folder

from lgl_plugin.embeddings import Embeddings
from lgl_plugin.manifest import held_out, load_manifest
from lgl_plugin.metrics import read_metrics


def launch(yaml, corpus, output, *options):
    """Starts the recipe in two processes."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--standalone", "--nproc_per_node=2"),
        *("train_lgl.py", f"hparams/{yaml}", "--distributed_backend=gloo"),
        *TINY,
        f"--data_folder={corpus}",
        f"--train_folder={corpus}/wav",
        f"--trial_folder={corpus}/wav",
        f"--output_folder={output}",
        *options,
    ]
    done = subprocess.run(
        command, cwd=RECIPE, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def ranks(corpus, stage1_run, tmp_path_factory):
    """Both stages; Stage II from the encoder of a single process."""
    output = tmp_path_factory.mktemp("ranks")
    launch("small_stage1.yaml", corpus, output, *STAGE1)
    options = [*STAGE2, f"--pretrained_encoder={stage1_run}/stage1"]
    launch("small_stage2.yaml", corpus, output, *options)
    return output


def test_each_epoch_is_logged_once(ranks):
    lines = (ranks / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == read_metrics(ranks)
    phases = [json.loads(line)["phase"] for line in lines]
    assert phases[-1] == "after gated" and phases.count("clusters") == 2


def test_pseudo_labels_are_those_of_one_process(ranks, run):
    first, second = (
        r / "iter1" / "labels" / "labels.csv" for r in (ranks, run)
    )
    assert first.read_text() == second.read_text()
    alone, together = (
        Embeddings.load(r / "iter1" / "embeddings") for r in (run, ranks)
    )
    assert np.array_equal(alone.vectors, together.vectors)


def test_the_gate_hears_of_the_losses_of_all(ranks, corpus):
    manifest = load_manifest(ranks / "manifest.csv", str(corpus))
    train, _ = held_out(len(manifest), 0.1, 1)
    with np.load(ranks / "iter1" / "classifier" / "gate.npz") as gate:
        seen = set(gate["rows"].tolist())
        # Each process drops the last, smaller batch.
        assert seen <= set(train.tolist())
        assert len(seen) > len(train) // 2
        assert np.isfinite(gate["losses"]).all()
        losses = dict(zip(gate["rows"].tolist(), gate["losses"].tolist()))
    path = ranks / "iter1" / "classifier" / "losses.ckpt"
    memory = torch.load(path, weights_only=True)["losses"]
    known = (~memory.isnan()).nonzero()[:, 0].tolist()
    assert set(known) == seen
    for row in known:
        assert memory[row] == pytest.approx(losses[row])


def test_trained_weights_load_in_one_process(ranks):
    weights = torch.load(
        ranks / "iter2" / "gated" / "embedding_model.ckpt", weights_only=True
    )
    assert all(value.isfinite().all() for value in weights.values())
    assert not any(key.startswith("module.") for key in weights)
