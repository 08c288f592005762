"""The examples around `lgl`: few labels, who is who, a diarisation's cuts."""

import csv

import numpy as np
import pytest
import torch
from tiny import ROOT, run_script

from lgl_plugin.dataio.audio import read_audio
from lgl_plugin.dataio.manifest import load_manifest

EXAMPLES = ROOT / "examples"


def test_fine_tuning_on_five_speakers(run, corpus, tmp_path):
    """The loss falls; the folder loads, with other weights."""
    source = run / "export" / "iter2"
    printed = run_script(
        EXAMPLES / "few_labels/finetune.py",
        EXAMPLES / "few_labels" / "finetune.yaml",
        f"--data_folder={corpus}/wav",
        f"--encoder_source={source}",
        f"--output_folder={tmp_path}",
        "--number_of_epochs=4",
        "--crop_seconds=0.5",
        "--lr=0.003",
        "--device=cpu",
        "--noprogressbar",
    )
    lines = [line for line in printed.splitlines() if line.startswith("epoch")]
    losses = [float(line.split()[-1]) for line in lines]
    assert len(losses) == 4 and losses[-1] < losses[0]
    weights = [
        torch.load(folder / "embedding_model.ckpt", weights_only=True)
        for folder in (source, tmp_path / "encoder")
    ]
    assert not torch.equal(*(w["fc.conv.weight"] for w in weights))
    means = [w["blocks.0.norm.norm.running_mean"] for w in weights]
    assert torch.equal(*means)


def test_who_is_who_links_files_by_speaker(run, corpus, tmp_path):
    source = run / "export" / "iter2"
    run_script(
        EXAMPLES / "who_is_who/who.py", source, corpus / "wav", tmp_path / "by"
    )
    links = [p for p in (tmp_path / "by").rglob("*") if p.is_symlink()]
    audio = {path.resolve() for path in (corpus / "wav").rglob("*.wav")}
    assert len(links) > 20 and {link.resolve() for link in links} <= audio
    assert {link.parent.name for link in links} >= {"speaker1"}


def test_cuts_of_a_diarisation(corpus, tmp_path):
    """One speaker alone, at the file's own rate; overlaps are left out."""
    audio = min((corpus / "wav").rglob("*.wav"))
    seconds = len(read_audio(audio)) / 16000
    assert seconds > 1
    turns = tmp_path / "turns.rttm"
    head = f"SPEAKER {audio.stem} 1"
    turns.write_text(
        f"{head} 0.000 {seconds:.3f} <NA> <NA> A <NA> <NA>\n"
        f"{head} {seconds - 0.05:.3f} 0.050 <NA> <NA> B <NA> <NA>\n"
    )
    output = tmp_path / "segments.csv"
    printed = run_script(
        EXAMPLES / "diarisation/cut.py", audio.parent, turns, output
    )
    assert "1 utterances" in printed
    manifest = load_manifest(output, audio.parent)
    assert manifest.durations[0] == pytest.approx(seconds - 0.05, abs=2e-3)
    with open(output, newline="", encoding="utf-8") as source:
        (row,) = csv.DictReader(source)
    assert row["spk_id"] == "" and row["start"] == "0"
    assert np.isfinite(manifest.offsets).all()
