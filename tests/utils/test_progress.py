"""Bars of the package's own work, and the option that silences them."""

import pathlib

import pytest

import lgl_plugin
from lgl_plugin.clustering.kmeans import TorchKMeans
from lgl_plugin.utils import progress


@pytest.fixture
def silenced():
    yield lambda value: progress.silence_bars({"noprogressbar": value})
    progress.silence_bars({})


def test_the_option_silences_bars(silenced, capsys):
    silenced(True)
    assert list(progress.tqdm(range(3), desc="files")) == [0, 1, 2]
    with progress.tqdm(total=3, disable=False) as bar:
        bar.set_description("k-means")
        bar.update()
    assert capsys.readouterr().err == ""
    silenced(False)
    assert list(progress.tqdm(range(3), "files", mininterval=0)) == [0, 1, 2]
    assert "files: 100%" in capsys.readouterr().err


def test_clustering_is_silent_too(silenced, capsys):
    import numpy as np

    points = np.random.default_rng(1).normal(size=(50, 4)).astype(np.float32)
    for silent in (True, False):
        silenced(silent)
        TorchKMeans(3, n_iterations=2)(points)
        printed = capsys.readouterr().err
        assert ("k-means" in printed, "assigning" in printed) == (
            not silent,
            not silent,
        )


def test_no_module_has_a_bar_that_cannot_be_silenced():
    package = pathlib.Path(lgl_plugin.__file__).parent
    direct = [
        path.relative_to(package).as_posix()
        for path in package.glob("**/*.py")
        if "from tqdm import" in path.read_text(encoding="utf-8")
    ]
    assert direct == []
