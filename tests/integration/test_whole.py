"""What is on disk is whole, or it is found, named and made again."""

import json
import os
import shutil

import pytest
from tiny import STAGE2, train, train_here

from lgl_plugin.report.results import Results
from lgl_plugin.runs.lock import lock_folder
from lgl_plugin.runs.metrics_log import read_metrics
from lgl_plugin.runs.state import read_state
from lgl_plugin.utils.files import checksum

TIMES = ("seconds", "utterances_per_second")


def start(corpus, output, stage, *options):
    """A stage as the command starts it, but in this process."""
    own = ["--number_of_epochs=1", "--ssps_epochs=0"]
    own = own if stage == 1 else STAGE2
    train_here(f"small_stage{stage}.yaml", corpus, output, *own, *options)


def messages(capsys):
    """What a user has read: SpeechBrain's logging has its own handlers."""
    lines = capsys.readouterr().out.splitlines()
    return [line.split(" - ", 1)[-1] for line in lines]


def figures(run):
    """All that was logged but the times it took."""
    return [
        {key: record[key] for key in record if key not in TIMES}
        for record in read_metrics(run)
    ]


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A finished run of both stages."""
    output = tmp_path_factory.mktemp("whole")
    for stage in (1, 2):
        start(corpus, output, stage)
    return output


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(finished, tmp_path / "run")


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def delete(path):
    path.unlink()


def delete_and_checkpoints(path):
    """Then the step starts from what came before it."""
    shutil.rmtree(path.parent / "checkpoints")
    path.unlink()


@pytest.mark.parametrize(
    "step, name, harm",
    [
        ("baselines", "floor.npz", flip),
        ("stage1", "embedding_model.ckpt", truncate),
        ("stage1", "embedding_model.ckpt", delete_and_checkpoints),
        ("export/stage1", "embedding_model.ckpt", flip),
        ("iter1/embeddings", "vectors.npy", flip),
        ("iter1/embeddings", "utterances.txt", truncate),
        ("iter1/labels", "labels.csv", flip),
        ("iter1/labels", "centroids.npy", delete),
        ("iter1/classifier", "gate.npz", delete),
        ("iter1/classifier", "classifier.ckpt", delete_and_checkpoints),
        ("iter1/gated", "embedding_model.ckpt", flip),
        ("iter2/gated", "gate.npz", truncate),
        ("iter2/gated", "scores.npz", delete),
    ],
)
def test_a_damaged_artefact_is_named_and_made_again(
    finished, copy, corpus, capsys, step, name, harm
):
    """To the same bytes, so that nothing made from it is done again."""
    harm(copy / step / name)
    start(corpus, copy, 2 if "iter" in step else 1)
    said = messages(capsys)
    (again,) = [line for line in said if "is done again" in line]
    assert again.startswith(f"{step} is done again: {name} ")
    assert figures(copy) == figures(finished)
    assert read_state(copy)["files"] == read_state(finished)["files"]
    labels = "iter2/labels/labels.csv"
    assert (copy / labels).read_text() == (finished / labels).read_text()


def test_a_damaged_manifest_is_made_again(finished, copy, corpus, capsys):
    flip(copy / "manifest.csv")
    start(corpus, copy, 2)
    manifest = (finished / "manifest.csv").read_text()
    assert (copy / "manifest.csv").read_text() == manifest
    assert not [line for line in messages(capsys) if "is done again" in line]


def test_another_manifest_is_refused(copy, corpus):
    """Labels, gates and memories hold rows of it."""
    manifest, sidecar = copy / "manifest.csv", copy / "manifest.csv.json"
    rows = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(rows[:-1]))
    made = json.loads(sidecar.read_text())
    made["manifest_bytes"] = manifest.stat().st_size
    made["manifest_sha256"] = checksum(manifest)
    sidecar.write_text(json.dumps(made))
    before = read_state(copy)
    with pytest.raises(ValueError, match="^manifest: .* is not what it was"):
        start(corpus, copy, 2)
    assert read_state(copy) == before


def test_stage2_uses_no_damaged_encoder_of_stage1(copy, corpus):
    """It says what to do, and that helps."""
    truncate(copy / "stage1" / "embedding_model.ckpt")
    with pytest.raises(ValueError, match="stage1.*embedding_model.ckpt.*again"):
        start(corpus, copy, 2)
    start(corpus, copy, 1)
    start(corpus, copy, 2)


def test_a_folder_in_use_is_left_alone(copy, corpus):
    """The second process says who holds it, and stops."""
    lock_folder(copy)
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    done = train("small_stage2.yaml", corpus, copy, *STAGE2, check=False)
    assert done.returncode != 0
    assert f"is being written by process {os.getpid()} " in done.stderr
    after = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    assert after == before


def test_an_export_that_failed_is_tried_again(
    finished, copy, corpus, monkeypatch
):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    delete(copy / "export" / "iter2" / "hyperparams.yaml")
    with monkeypatch.context() as patch:
        patch.setattr("lgl_plugin.training.session.export", full)
        start(corpus, copy, 2)
    failed = read_state(copy)["failed"]
    assert list(failed) == ["export/iter2"] and "No space" in str(failed)
    assert Results(copy).failed == failed
    start(corpus, copy, 2)
    state = read_state(copy)
    assert not state["failed"] and state["done"] == read_state(finished)["done"]


@pytest.mark.parametrize("place", ["{parent}/corpus/", "corpus", "moved/here"])
def test_data_may_lie_elsewhere(copy, corpus, capsys, monkeypatch, place):
    """A slash more, a relative path, another disk: the audio is the same."""
    monkeypatch.chdir(copy.parent)
    (copy.parent / "corpus").symlink_to(corpus)
    shutil.copytree(corpus, copy.parent / "moved" / "here")
    for stage in (1, 2):
        start(place.format(parent=copy.parent), copy, stage)
    said = messages(capsys)
    assert "stage1 is done, going on" in said
    assert "iter2/gated is done, going on" in said
    assert not [line for line in said if "is done again" in line]


def test_how_it_runs_may_change(copy, corpus, capsys):
    """More loader processes and rarer checkpoints, as health.py advises."""
    options = ["--dataloader_options={num_workers: 1}"]
    start(corpus, copy, 2, *options, "--ckpt_interval_minutes=5")
    said = messages(capsys)
    assert "iter2/gated is done, going on" in said
    with pytest.raises(ValueError) as error:
        start(corpus, copy, 2, *options, "--n_clusters=6")
    lines = str(error.value).splitlines()
    assert lines[1:] == ["n_clusters: was 5, is 6"]
    assert f"--pretrained_encoder={copy}/stage1" in lines[0]
