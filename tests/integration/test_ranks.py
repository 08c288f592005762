"""Two processes by torchrun, as on two GPUs, but with gloo on the CPU.

And as on two machines: slurm.sh starts them, by a stub of srun that starts a
torchrun for each.
"""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import fit_in_ranks  # of tests/
import numpy as np
import pytest
import torch
from tiny import RECIPE, STAGE1, STAGE2, train_here, words
from tiny_brains import BRAINS

from lgl_plugin.dataio.manifest import held_out, load_manifest
from lgl_plugin.inference.store import Embeddings
from lgl_plugin.runs.metrics_log import read_metrics

TORCHRUN = [
    *(sys.executable, "-m", "torch.distributed.run"),
    *("--standalone", "--nproc_per_node=2"),
]


def gloo(yaml, corpus, output, *options):
    """The recipe with its options, for processes that meet on a CPU."""
    options = ("--distributed_backend=gloo", *options)
    return words(yaml, corpus, output, *options)


SLURM = {
    "srun": 'shift; "$@" & "$@" && wait $!',
    "scontrol": "echo localhost",
}


def slurm_job(folder):
    """The environment of a job on two machines, with Slurm's commands."""
    for name, text in SLURM.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    folders = (folder, pathlib.Path(sys.executable).parent, os.environ["PATH"])
    return {
        **os.environ,
        "PATH": os.pathsep.join(map(str, folders)),
        "SLURM_JOB_ID": str((port - 10000) % 50000),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "2",
    }


def run_to_end(command, environment):
    """Runs a command in the recipe's folder."""
    done = subprocess.run(
        command,
        cwd=RECIPE,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@pytest.fixture(scope="module")
def fitted(corpus, stage1_run, tmp_path_factory):
    """Folders of all kinds of fits, by one process and by two.

    The two then run both stages; Stage II from the encoder of one process.
    """
    folder = tmp_path_factory.mktemp("fitted")
    for name in ("one", "two"):
        for kind in BRAINS:
            (folder / name / kind).mkdir(parents=True)
    fit_in_ranks.main(BRAINS, folder / "one")
    given = f"--pretrained_encoder={stage1_run}/stage1"
    commands = [
        gloo(f"small_stage{stage}.yaml", corpus, folder / "run", *options)[1:]
        for stage, options in ((1, STAGE1), (2, [*STAGE2, given]))
    ]
    script = [fit_in_ranks.__file__, str(folder / "two"), json.dumps(commands)]
    found = os.pathsep.join([str(RECIPE), os.environ.get("PYTHONPATH", "")])
    job = slurm_job(tmp_path_factory.mktemp("bin"))
    job["PYTHONPATH"] = found
    run_to_end(["bash", "slurm.sh", *script], job)
    return folder


@pytest.fixture
def ranks(fitted):
    """A run of both stages in two processes."""
    return fitted / "run"


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


def test_trained_weights_load_in_one_process(ranks):
    weights = torch.load(
        ranks / "iter2" / "gated" / "embedding_model.ckpt", weights_only=True
    )
    assert all(value.isfinite().all() for value in weights.values())
    assert not any(key.startswith("module.") for key in weights)


def by_group(weights):
    """Sorts a queue by group: processes fill it in another order than one."""
    found = [n.removesuffix("groups") for n in weights if "queue.groups" in n]
    for queue in found:
        groups = weights[f"{queue}groups"]
        assert len(groups.unique()) == len(groups)  # else no order is given
        for part in ("groups", "vectors"):
            weights[queue + part] = weights[queue + part][groups.argsort()]
    return weights


@pytest.mark.parametrize("kind", list(BRAINS))
def test_losses_and_weights_are_those_of_one_process(kind, fitted):
    """At the same global batch: negatives of all, and the selected of all.

    In the gated case one of the processes selects nothing at all.
    """
    found = []
    for name in ("one", "two"):
        folder = fitted / name / kind
        weights = torch.load(folder / "weights.ckpt", weights_only=True)
        found.append(
            (
                by_group(weights),
                json.loads((folder / "records.json").read_text()),
            )
        )
    (weights, records), (other_weights, other_records) = found
    for name, value in weights.items():
        torch.testing.assert_close(value, other_weights[name], msg=name)
    assert len(records) == 2
    for record, other in zip(records, other_records):
        for name in ("loss", "accuracy", "selected_share", "pseudo_eer"):
            if name in record:
                assert record[name] == pytest.approx(other[name], rel=1e-5)


@pytest.mark.parametrize("kind", fit_in_ranks.WITH_LOCAL_VIEWS)
def test_local_views_and_batch_normalisation_in_two_processes(kind, fitted):
    """Their weights are alike; those of one process would be others."""
    folder = fitted / "two" / f"{kind} as it is"
    first, second = (torch.load(folder / f"{r}.ckpt") for r in (0, 1))
    for records in (first.pop("records"), second.pop("records")):
        losses = [record["loss"] for record in records]
        assert len(losses) == 2 and np.isfinite(losses).all()
        assert not any(record["skipped_steps"] for record in records)
    assert list(first) == list(second)
    for name, value in first.items():
        assert value.isfinite().all() and torch.equal(value, second[name]), name


def test_killed_process_ends_the_job_and_one_process_goes_on(
    corpus, tmp_path, capsys
):
    """In batches twice as large; with others it warns that these are smaller.

    Another copy of the run does the latter.
    """
    options = (
        "--number_of_epochs=3",
        "--ssps_epochs=0",
        "--ckpt_interval_minutes=0",
        "--ckpt_interval_steps=1",
    )
    recipe = gloo("small_stage1.yaml", corpus, tmp_path / "run", *options)
    job = subprocess.Popen(
        [*TORCHRUN, *recipe],
        cwd=RECIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in job.stdout:
        if "Going into epoch 2" in line:
            break
    children = pathlib.Path(f"/proc/{job.pid}/task/{job.pid}/children")
    os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)
    killed = time.monotonic()
    rest = job.stdout.read()
    assert job.wait() != 0
    assert time.monotonic() - killed < 60
    assert "Signal 9 (SIGKILL)" in rest  # torchrun's table of who failed
    shutil.copytree(tmp_path / "run", tmp_path / "smaller")
    for name, batch_size, warned in (("run", 16, False), ("smaller", 8, True)):
        more = *options, f"--batch_size={batch_size}"
        train_here("small_stage1.yaml", corpus, tmp_path / name, *more)
        printed = "".join(capsys.readouterr())
        assert "Going into epoch 3" in printed
        assert "Going into epoch 1" not in printed
        assert ("--batch_size=16 makes that batch" in printed) == warned
        epochs = [
            record["epoch"]
            for record in read_metrics(tmp_path / name)
            if record["phase"] == "simclr"
        ]
        assert epochs == [1, 2, 3]
