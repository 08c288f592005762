"""What is recorded of each start of a run."""

import json
import subprocess
import sys

import pytest
import torch

from lgl_plugin.runs import provenance


def git(folder, *words):
    names = ("-c", "user.name=a", "-c", "user.email=a@b.example")
    return subprocess.run(
        ["git", *names, *words],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with the plugin's file in it."""
    folder = tmp_path / "lgl_plugin"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "provenance.py").write_text("")
    monkeypatch.setattr(provenance, "__file__", str(folder / "provenance.py"))
    git(tmp_path, "init", "-q")
    return tmp_path


def test_commit_of_the_repository(repository):
    git(repository, "add", ".")
    git(repository, "commit", "-q", "-m", "first")
    head = git(repository, "rev-parse", "HEAD")
    assert provenance.commit() == head
    (repository / "lgl_plugin" / "__init__.py").write_text("changed = 1")
    assert provenance.commit() == head + "+"


def test_no_commit_where_the_plugin_is_not_in_one(repository, monkeypatch):
    """Such as an environment below somebody else's repository."""
    (repository / "other").write_text("")
    git(repository, "add", "other")
    git(repository, "commit", "-q", "-m", "first")
    assert provenance.commit() is None
    monkeypatch.setenv("PATH", "")
    assert provenance.commit() is None


def test_every_start_is_kept(tmp_path, monkeypatch):
    words = ["train_lgl.py", "hparams/my stage1.yaml", "--lr=$x"]
    monkeypatch.setattr(sys, "argv", words)
    for stage in (1, 2):
        provenance.record_start(tmp_path, stage, "cpu")
    with open(tmp_path / provenance.STARTS, "a") as out:
        out.write('{"torn')
    first, second = provenance.read_starts(tmp_path)
    assert (first["stage"], second["stage"]) == (1, 2)
    assert first["command"] == (
        "python train_lgl.py 'hparams/my stage1.yaml' '--lr=$x'"
    )
    assert torch.__version__.startswith(first["versions"]["torch"])
    assert json.dumps(first)
    for name in ("time", "host", "device", "processes", "system", "threads"):
        assert first[name]
