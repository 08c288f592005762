"""Each row of tests/recipes/*.csv runs in debug mode, as its flags say."""

import csv
import re
import shlex
import sys

import pytest
import tiny_speech
import train_lgl  # of the recipe's folder
from tiny import ROOT

from lgl_plugin.runs.settings import read_preset

TABLE = ROOT / "tests" / "recipes" / "VoxCeleb.csv"
with open(TABLE, newline="", encoding="utf-8") as source:
    ROWS = list(csv.DictReader(source))
# Of the rows below the first, which trains as wide a network as its yaml says.
NARROW = "{network: {channels: [16, 16, 16, 16, 48], attention_channels: 16}}"


def test_every_yaml_has_a_row():
    """But those without a stage, which others begin with."""
    yamls = {
        path.name
        for path in (ROOT / "hparams").glob("*.yaml")
        if "stage" in read_preset(path)
    }
    assert {row["Hparam_file"].split("/")[-1] for row in ROWS} == yamls


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r["Hparam_file"])
def test_row(row, corpus, tmp_path, monkeypatch):
    flags = re.sub("tests/samples/corpus", str(corpus), row["test_debug_flags"])
    narrow, family = "new_encoder", "wavlm"
    if "tests/samples/speech_model" in flags:
        narrow = "new_first_encoder"
        if "w2vbert" in row["Hparam_file"]:
            family = "wav2vec2-bert"
        source = tiny_speech.save(tmp_path / "model", family=family)
        flags = re.sub("tests/samples/speech_model", source, flags)
    # Values in braces hold spaces; SpeechBrain's harness keeps them together.
    flags = re.sub(r"(--\w+=\{[^}]*\})", r"'\1'", flags)
    typed = [row["Script_file"], row["Hparam_file"], *shlex.split(flags)]
    typed.append(f"--output_folder={tmp_path}")
    if row is not ROWS[0]:
        typed.append(f"--{narrow}={NARROW}")
        if read_preset(ROOT / row["Hparam_file"]).get("new_last_encoder"):
            typed.append(f"--new_last_encoder={NARROW}")
    assert (ROOT / typed[0]).samefile(train_lgl.__file__)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", typed)
    # The page takes longer than most rows.
    monkeypatch.setattr(train_lgl, "try_to_write_report", id)
    train_lgl.main()
    for name in row["test_debug_checks"][len("file_exists=[") : -1].split(","):
        assert (tmp_path / name).exists(), name
