"""benchmarks/few_labels.py: its refusals."""

import pathlib
import sys

import pytest
from tiny import run_script

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("typed", ["--speaker=3", "--gated_epoch=3"])
def test_a_mistyped_option_is_refused_at_once(monkeypatch, tmp_path, typed):
    """Neither taken for short nor found by the first training."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    work = f"--work={tmp_path / 'work'}"
    # Else later tests of this process would use all cores.
    options = work, "--threads=1", typed
    with pytest.raises(ValueError, match="no setting .*(speaker|did you mean)"):
        run_script(BENCHMARKS / "few_labels.py", "encoder", "corpus", *options)
    assert not any(tmp_path.iterdir())
