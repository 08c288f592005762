"""The tutorial: every cell runs, and what is shown came of such a run."""

import importlib.util
import re

import nbformat
import pytest
from tiny import ROOT

TINY = """
size = dict(speakers=5, test_speakers=4, sessions=2, utterances=3)
size |= dict(seconds=(1.0, 2.0), seed=3, workers=1)
tiny = ["--batch_size=8", "--dataloader_options={num_workers: 0}"]
tiny += ["--steps_per_epoch=null"]
tiny += ["--crop_seconds=0.5", "--device=cpu"]
tiny += ["--new_encoder={network: {channels: [16, 16, 16, 16, 48]}}"]
stage1 = ["--number_of_epochs=1", "--ssps_epochs=0", *tiny]
stage2 = ["--n_iterations=1", "--classifier_epochs=1", *tiny]
stage2 += ["--gated_epochs=1"]
n_clusters = 5
"""


@pytest.fixture(scope="module")
def script():
    """docs/run_tutorial.py as a module."""
    spec = importlib.util.spec_from_file_location(
        "run_tutorial", ROOT / "docs" / "run_tutorial.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def committed(script):
    """The notebook as it is."""
    return nbformat.read(script.TUTORIAL, as_version=4)


def code(notebook):
    """The cells of code."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_every_cell_runs(script, committed, tmp_path, monkeypatch):
    """On the tiny corpus, and each shows what the committed one does."""
    for name in ("IPYTHONDIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    (tmp_path / "docs").mkdir()
    done = script.execute(tmp_path / "docs", TINY)
    script.tidy(done)
    kinds = [
        [[output.output_type for output in cell.outputs] for cell in code(each)]
        for each in (done, committed)
    ]
    assert kinds[0] == kinds[1]
    assert (tmp_path / "results/tutorial/run/report/index.html").exists()
    # Nothing is left beside the notebook.
    assert not list((tmp_path / "docs").iterdir())


def test_outputs_are_of_one_run_from_the_first_cell_to_the_last(committed):
    counts = [cell.execution_count for cell in code(committed)]
    assert counts == list(range(1, len(counts) + 1))


def test_nothing_in_it_names_a_machine(committed):
    """Neither a path, nor a kernel's or an editor's metadata."""
    assert committed.metadata == {
        "kernelspec": {
            "display_name": "Python 3",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
    }
    for cell in committed.cells:
        assert set(cell.metadata) <= {"tags"}
        for output in cell.get("outputs", ()):
            texts = [output.get("text", "")]
            for kind, data in output.get("data", {}).items():
                texts += [data] * kind.startswith("text/")
            for text in texts:
                assert not re.search(r"(?<![\w.])(~|[A-Z]:)?[/\\]\w", text)


def test_it_stays_small(script):
    assert script.TUTORIAL.stat().st_size < 200_000
