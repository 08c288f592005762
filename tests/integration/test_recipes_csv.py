"""Each row of tests/recipes/*.csv runs in debug mode, as its flags say."""

import csv
import re
import shlex
import subprocess
import sys

import pytest
from tiny import ROOT

from lgl_plugin.runs.settings import read_preset

TABLE = ROOT / "tests" / "recipes" / "VoxCeleb.csv"
with open(TABLE, newline="", encoding="utf-8") as source:
    ROWS = list(csv.DictReader(source))


def test_every_yaml_has_a_row():
    """But those without a stage, which others begin with."""
    yamls = {
        path.name
        for path in (ROOT / "hparams").glob("*.yaml")
        if "stage" in read_preset(path)
    }
    assert {row["Hparam_file"].split("/")[-1] for row in ROWS} == yamls


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r["Hparam_file"])
def test_row(row, corpus, tmp_path):
    flags = re.sub("tests/samples/corpus", str(corpus), row["test_debug_flags"])
    # Values in braces hold spaces; SpeechBrain's harness keeps them together.
    flags = re.sub(r"(--\w+=\{[^}]*\})", r"'\1'", flags)
    done = subprocess.run(
        [
            sys.executable,
            row["Script_file"],
            row["Hparam_file"],
            f"--output_folder={tmp_path}",
            *shlex.split(flags),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in row["test_debug_checks"][len("file_exists=[") : -1].split(","):
        assert (tmp_path / name).exists(), name
