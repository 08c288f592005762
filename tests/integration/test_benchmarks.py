"""Benchmarks compare the same work, and their rows say what they do."""

import argparse
import importlib.util
import json
import pathlib

import numpy as np
import pytest
from tiny import run_script

from lgl_plugin.clustering.kmeans import TorchKMeans
from lgl_plugin.dataio.manifest import Strings
from lgl_plugin.inference.store import Embeddings

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The scripts import each other, as from their own folder."""
    monkeypatch.syspath_prepend(BENCHMARKS)


def load(name):
    """Imports a script; not by its name, which is a folder's of the tests."""
    path = BENCHMARKS / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_option_that_nothing_reads_is_refused(capsys):
    arguments = load("common").arguments
    one = "--threads=1"  # else later tests of this process would use all
    given = arguments("").parse_args([one, "--device=cuda", "--repeats=1"])
    assert (given.device, given.repeats) == ("cuda", 1)
    for option in ("device", "repeats"):
        with pytest.raises(SystemExit):
            parser = arguments("", **{option: False})
            parser.parse_args([one, f"--{option}=1"])
        assert f"unrecognized arguments: --{option}" in capsys.readouterr().err


def test_the_baseline_of_a_step_leaves_as_many_clean(monkeypatch):
    """As ours: augmenting more would make it slower for that alone."""
    step = load("step")
    noises = {kind: ["noise.wav"] * 9 for kind in step.SNR}
    for clean, wanted in ((0.0, 0), (0.25, 250)):
        data = step.PerFile([], [], 1, 2, clean, noises, ["room.wav"])
        profiles = iter(np.linspace(0, 1, 1000, endpoint=False))
        with monkeypatch.context() as patch:
            patch.setattr(step.random, "random", profiles.__next__)
            drawn = [data.draw() for _ in range(1000)]
        rooms = sum(room is not None for room, _ in drawn)
        assert drawn.count((None, [])) == wanted
        assert rooms == sum(bool(added) for _, added in drawn) == 750 - wanted


def test_clusterings_iterations_see_a_sample():
    kmeans = TorchKMeans(10, max_points_per_centroid=5, n_iterations=4)
    cost = load("cost").clustering
    assert cost(kmeans, 3, 20) == 2 * 10 * 3 * (4 + 1)
    assert cost(kmeans, 3, 500) == 2 * 10 * 3 * (4 * 0.1 + 1)


def test_few_labels_tells_the_error_rate_of_the_end(tmp_path):
    phases = {"classifier": 9.0, "gated": 8.0, "large_margin": 7.0}
    records = [{"phase": "clusters", "n_clusters": 5, "ami": 0.5}]
    records += [{"phase": f"after {p}", "eer": phases[p]} for p in phases]
    lines = [json.dumps({"stage": 2, "iteration": 1, **r}) for r in records]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    found = load("few_labels").figures(tmp_path)
    assert found == {"EER %": 7.0, "classes": 5, "AMI": 0.5}


def test_a_runs_speakers_are_those_that_are_known(tmp_path, monkeypatch):
    """By the manifest that the yaml names, which lies elsewhere."""
    names = [f"{n}.wav" for n in range(5)]
    rows = [f"{n},1.0,{n},0,16000,{s}" for n, s in zip(names, "aab  ")]
    path = tmp_path / "own.csv"
    header = "ID,duration,wav,start,stop,spk_id"
    path.write_text("\n".join([header, *rows]).replace(" ", ""), "utf-8")
    settings = {"manifest": str(path), "data_folder": ""}
    settings["allow_outside_data_folder"] = True
    number, run = load("number"), tmp_path / "run"
    state = {"settings": {"stage 2": settings}}
    monkeypatch.setattr(number, "read_state", lambda folder: state)
    vectors = np.eye(5, dtype=np.float32)
    Embeddings(Strings(names), vectors).save(run / "iter1" / "embeddings")
    found, n_speakers = number.of_run(run)
    assert n_speakers == 2
    np.testing.assert_array_equal(found, vectors[:3])


def test_clusterings_are_compared(monkeypatch):
    clustering, told = load("clustering"), []
    report = lambda rows, *others: told.extend(rows)  # noqa: E731
    monkeypatch.setattr(clustering.common, "report", report)
    sizes = dict(n=200, k=4, dim=8, iterations=2, spread=0.1, two_step=8)
    given = dict(device="cpu", threads=1, repeats=1, starts=False)
    given.update(rivals=[], backend="torch", json=None)
    options = argparse.Namespace(**sizes, **given)
    clustering.main(options)
    names = [row["clustering"] for row in told]
    assert names == ["torch cpu", "torch cpu, two steps"]
    assert told[0]["times the first"] == 1
    worked = [row["of a processor"] for row in told]
    assert told[1]["times the first"] == worked[1] / worked[0]


@pytest.mark.parametrize("typed", ["--speaker=3", "--gated_epoch=3"])
def test_few_labels_refuses_a_mistyped_option_at_once(tmp_path, typed):
    """Neither taken for short nor found by the first training."""
    work = f"--work={tmp_path / 'work'}"
    # Else later tests of this process would use all cores.
    options = work, "--threads=1", typed
    with pytest.raises(ValueError, match="no setting .*(speaker|did you mean)"):
        run_script(BENCHMARKS / "few_labels.py", "encoder", "corpus", *options)
    assert not any(tmp_path.iterdir())
