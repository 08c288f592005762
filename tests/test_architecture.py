"""The wings of the package: imports only go down."""

import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
LINT = pathlib.Path(sys.executable).with_name("lint-imports")


def lint(folder):
    """Runs import-linter on the package in a folder; (its status, output)."""
    done = subprocess.run(
        [LINT, "--no-cache"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": str(folder), "COLUMNS": "200"},
    )
    return done.returncode, done.stdout + done.stderr


def test_imports_only_go_down():
    """The broken arrows are in the message."""
    status, output = lint(ROOT)
    assert status == 0, output[output.find("Broken contracts") :]


PLANTED = {
    "nnet/losses.py": "import lgl_plugin.report.build",
    "nnet/gates.py": "import speechbrain",
    # By way of which `methods` reads true labels, too.
    "training/held_out.py": "import lgl_plugin.evaluation.observer",
}


def test_each_broken_contract_is_named(tmp_path):
    """Of a copy of the package in which some modules begin with an import."""
    ignored = shutil.ignore_patterns("__pycache__", "recipe")
    package = tmp_path / "lgl_plugin"
    shutil.copytree(ROOT / "lgl_plugin", package, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for path, line in PLANTED.items():
        text = (package / path).read_text("utf-8")
        (package / path).write_text(f"{line}\n{text}", "utf-8")
    status, output = lint(tmp_path)
    assert status == 1
    assert "Imports only go down BROKEN" in output
    assert "lgl_plugin.nnet.losses -> lgl_plugin.report.build" in output
    assert "Nothing that trains or adapts can read true labels BROKEN" in output
    label = "lgl_plugin.training.held_out -> lgl_plugin.evaluation.observer"
    assert label in output
    assert "lgl_plugin.nnet.gates -> speechbrain" in output
