"""What pip installs: an sdist, a wheel, and the recipe that it carries."""

import filecmp
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import soundfile

from lgl_plugin.cli.recipe import RECIPE, copy_recipe

ROOT = pathlib.Path(__file__).parents[1]
RECIPE_FILES = {
    "README.md",
    *(path.name for path in RECIPE.glob("*.py")),
    *(path.name for path in RECIPE.glob("*.sh")),
    *(str(path.relative_to(RECIPE)) for path in RECIPE.glob("*/*.yaml")),
}
YAMLS = {f"hparams/{path.name}" for path in (ROOT / "hparams").iterdir()}
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
BUILD_SDIST = "from setuptools.build_meta import *; build_sdist('dist')"


def run(command, folder, **environment):
    """Runs a command in a folder; its output, errors included."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def sources(folder):
    """A folder's code, yamls and texts, but for those that tests leave."""
    for path in folder.rglob("*.*"):
        left = {"__pycache__", "tmp"} & set(path.relative_to(ROOT).parts)
        if path.suffix in (".py", ".md", ".yaml") and not left:
            yield path


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Built from a copy: a build leaves files behind."""
    tree = tmp_path_factory.mktemp("tree") / "tree"
    ignored = (".*", "__pycache__", "*.egg-info", "build", "results", "tmp")
    shutil.copytree(
        ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(*ignored)
    )
    run([sys.executable, "-c", BUILD_SDIST], tree)
    (made,) = (tree / "dist").iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built from the sdist, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet"]
    run([*PIP, "wheel", *options, "--wheel-dir", folder, sdist], folder)
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs Python, outside the checkout, with the wheel's package."""
    site = tmp_path_factory.mktemp("site")
    options = ["--no-deps", "--no-index", "--quiet", "--target", site]
    run([*PIP, "install", *options, wheel], site)

    def python(folder, *arguments):
        return run([sys.executable, *arguments], folder, PYTHONPATH=str(site))

    found = python(
        site.parent, "-c", "import lgl_plugin as p; print(p.__file__)"
    )
    assert found.startswith(str(site))
    return python


def test_sdist_has_all_that_the_checkout_has(sdist):
    """Recipe and yamls as files, in both of their places."""
    with tarfile.open(sdist) as archive:
        files = [member for member in archive if not member.isdir()]
        names = {member.name.split("/", 1)[1] for member in files}
        assert not [member.name for member in files if member.issym()]
    for name in RECIPE_FILES:
        assert f"lgl_plugin/recipe/{name}" in names
    for folder in ("lgl_plugin", "hparams", "tests", "examples", "docs"):
        for path in sources(ROOT / folder):
            assert str(path.relative_to(ROOT)) in names
    assert not [name for name in names if "__pycache__" in name]


def test_wheel_has_the_package_and_the_recipe_alone(wheel):
    """No tests, no benchmarks; the yamls as they are here."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for name in RECIPE_FILES:
            packed = archive.read(f"lgl_plugin/recipe/{name}")
            assert packed == (RECIPE / name).read_bytes()
    for path in sources(ROOT / "lgl_plugin"):
        assert str(path.relative_to(ROOT)) in names
    for path in ("report/page.html", "inference/model_card.md", "py.typed"):
        assert f"lgl_plugin/{path}" in names
    assert YAMLS < RECIPE_FILES
    for name in ("hparams/common.yaml", "hparams/small.yaml", "experiments.py"):
        assert name in RECIPE_FILES
    assert {name.split("/")[0].split("-")[0] for name in names} == {
        "lgl_plugin"
    }


def test_command_copies_the_recipe_which_runs(installed, tmp_path):
    """From pip to training, with no checkout."""
    installed(tmp_path, "-m", "lgl_plugin", "recipe", "mine")
    mine = tmp_path / "mine"
    copies = {
        str(path.relative_to(mine))
        for path in mine.rglob("*")
        if path.is_file()
    }
    assert copies == RECIPE_FILES
    rng = np.random.default_rng(0)
    (tmp_path / "audio").mkdir()
    for n in range(12):
        noise = rng.normal(scale=0.1, size=16000)
        soundfile.write(tmp_path / "audio" / f"{n}.wav", noise, 16000)
    installed(
        mine,
        "train_lgl.py",
        "hparams/small_stage1.yaml",
        "--debug",
        "--device=cpu",
        f"--data_folder={tmp_path}/audio",
        f"--train_folder={tmp_path}/audio",
        "--verification_file=null",
        "--batch_size=4",
        "--crop_seconds=0.4",
        "--new_encoder={network: {channels: [16, 16, 16, 16, 48]}}",
        "--output_folder=run",
    )
    assert (mine / "run/debug/stage1/embedding_model.ckpt").exists()


def test_a_copy_that_a_full_disk_ended_can_be_repeated(tmp_path, monkeypatch):
    left = [9]

    def full(descriptor):
        left[0] -= 1
        if not left[0]:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on the disk.*Make"):
            copy_recipe(tmp_path)
    found = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert 0 < len(found) < len(RECIPE_FILES)
    for path in found:
        source = RECIPE / path.relative_to(tmp_path)
        assert filecmp.cmp(path, source, shallow=False)
    assert len(copy_recipe(tmp_path)) == len(RECIPE_FILES)


def test_nothing_is_overwritten_unless_asked(tmp_path):
    copy_recipe(tmp_path)
    changed = tmp_path / "hparams" / "stage1.yaml"
    changed.write_text("mine")
    (tmp_path / "train_lgl.py").unlink()
    with pytest.raises(FileExistsError, match="hparams/stage1.yaml.*--over"):
        copy_recipe(tmp_path)
    assert changed.read_text() == "mine"
    assert not (tmp_path / "train_lgl.py").exists()
    copy_recipe(tmp_path, overwrite=True)
    assert filecmp.cmp(changed, RECIPE / "hparams/stage1.yaml", shallow=False)
