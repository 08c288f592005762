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


def planted(folder, path, line):
    """Lints a copy of the package in which one module begins with a line."""
    ignored = shutil.ignore_patterns("__pycache__", "recipe")
    shutil.copytree(ROOT / "lgl_plugin", folder / "lgl_plugin", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    module = folder / "lgl_plugin" / path
    module.write_text(f"{line}\n{module.read_text('utf-8')}", "utf-8")
    return lint(folder)


def test_imports_only_go_down():
    """The broken arrows are in the message."""
    status, output = lint(ROOT)
    assert status == 0, output[output.find("Broken contracts") :]


def test_an_upward_import_is_named(tmp_path):
    line = "import lgl_plugin.report.build"
    status, output = planted(tmp_path, "nnet/losses.py", line)
    assert status == 1
    assert "Imports only go down BROKEN" in output
    assert "lgl_plugin.nnet.losses -> lgl_plugin.report.build" in output


def test_training_may_not_read_true_labels(tmp_path):
    """Nor by way of a module in between: here, of the encoder's export."""
    line = "import lgl_plugin.evaluation.observer"
    status, output = planted(tmp_path, "training/held_out.py", line)
    assert status == 1
    assert "Nothing that trains can read true labels BROKEN" in output


def test_losses_know_no_toolkit(tmp_path):
    status, output = planted(tmp_path, "nnet/gates.py", "import speechbrain")
    assert status == 1
    assert "lgl_plugin.nnet.gates -> speechbrain" in output
