"""SpeechBrain's verification script, unmodified, against our own scores.

`make test-speechbrain SPEECHBRAIN_SRC=<checkout>` runs it; without a checkout
the tests that need it are skipped.
"""

import csv
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

from lgl_plugin.dataio.manifest import Manifest
from lgl_plugin.dataio.trials import read_trials, trial_audio
from lgl_plugin.evaluation.verification import (
    adaptive_s_norm,
    cohort_statistics,
    cosine_scores,
)
from lgl_plugin.inference.export import export_checkpoint
from lgl_plugin.inference.extractor import Extractor, load_extractor
from lgl_plugin.metrics.error_rates import eer
from lgl_plugin.runs.plain import dump_settings, plain_settings
from lgl_plugin.runs.pretrained import build_encoder
from lgl_plugin.runs.settings import load_settings

SOURCE = os.environ.get("SPEECHBRAIN_SRC")
of_speechbrain = pytest.mark.skipif(
    not SOURCE, reason="SPEECHBRAIN_SRC names no checkout"
)
ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = pathlib.Path(SOURCE or "").resolve() / "recipes/VoxCeleb/SpeakerRec"
YAML = ROOT / "recipes/VoxCeleb/LGL/verification/verification_ecapa.yaml"
RATE = 16000
SPEAKERS, TESTED, EACH = 8, 5, 4
NARROW = {"channels": [16, 16, 16, 16, 48], "attention_channels": 16}
COHORT = 10  # highest scores that count


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Buzzes of a pitch and a colour, in VoxCeleb's layout, and trials."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for speaker in range(SPEAKERS):
        pitch, colour = rng.uniform(80, 250), rng.normal(size=12)
        for n in range(EACH):
            # The script cuts its cohort into pieces of 3 s.
            time = np.arange(int(RATE * rng.uniform(3.1, 6.5))) / RATE
            phase = 2 * np.pi * pitch * rng.uniform(0.9, 1.1) * time
            tones = np.sin(np.outer(np.arange(1, 13), phase))
            wav = np.exp(colour + 0.5 * rng.normal(size=12)) @ tones
            wav += rng.normal(size=len(wav))
            path = folder / "wav" / f"id{speaker}" / f"s{n}" / "00001.wav"
            path.parent.mkdir(parents=True)
            soundfile.write(path, 0.5 * wav / np.abs(wav).max(), RATE)
    names = [
        f"id{speaker}/s{n}/00001.wav"
        for speaker in range(TESTED)
        for n in range(EACH)
    ]
    lines = [
        f"{first[:3] == second[:3]:d} {first} {second}\n"
        for first in names
        for second in names
        if first < second
    ]
    (folder / "trials.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def extract(settings):
    """Our extractor around an encoder that has seen the corpus's like.

    With the norms' first statistics all embeddings would be nearly the same,
    and s-norm would measure rounding.
    """
    torch.manual_seed(0)
    encoder = build_encoder(settings)
    for _ in range(40):
        encoder.network(torch.randn(8, 1, 80) + 2 * torch.randn(8, 100, 80))
    return Extractor(encoder.eval())


@pytest.fixture(scope="module")
def settings():
    """Stage I's settings, with a narrow encoder, as plain data."""
    own = {"data_folder": "corpus", "new_encoder": {"network": NARROW}}
    text = dump_settings(own)
    text = load_settings(ROOT / "hparams" / "stage1.yaml", text)[1]
    return plain_settings(text)


@pytest.fixture(scope="module")
def exported(extract, settings, tmp_path_factory):
    """Its exported folder."""
    folder = tmp_path_factory.mktemp("exported")
    weights = folder / "encoder.ckpt"
    torch.save(extract.encoder.network.state_dict(), weights)
    export_checkpoint(weights, settings, folder / "model")
    return folder / "model"


@pytest.fixture(scope="module", params=["null", "s-norm"])
def script(request, corpus, exported):
    """What the script leaves: its folder, and the EER that it prints."""
    done = subprocess.run(
        [
            sys.executable,
            "speaker_verification_cosine.py",
            str(YAML),
            f"--data_folder={corpus}",
            f"--verification_file={corpus}/trials.txt",
            f"--pretrain_path={exported}",
            f"--score_norm={request.param}",
            f"--cohort_size={COHORT}",
            "--device=cpu",
            *(f"--{key}={value}" for key, value in NARROW.items()),
        ],
        cwd=SCRIPTS,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rate = re.search(r"EER\(%\)=([\d.]+)", done.stdout + done.stderr)
    return request.param, exported / "verification", float(rate[1])


def test_the_exported_encoder_is_ours(corpus, extract, exported):
    trials = read_trials(corpus / "trials.txt", corpus / "wav")
    audio = trial_audio(trials, corpus / "wav")
    rows = np.arange(len(audio))
    ours, theirs = (
        one(audio, rows)[0].vectors
        for one in (extract, load_extractor(exported))
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@of_speechbrain
def test_scores_and_eer(script, corpus, extract):
    """Every trial to 1e-4; the EER to a trial of the rarer class."""
    norm, output, rate = script
    trials = read_trials(corpus / "trials.txt", corpus / "wav")
    audio = trial_audio(trials, corpus / "wav")
    embeddings = extract(audio, np.arange(len(audio)))[0].vectors
    ours = cosine_scores(embeddings, trials)
    assert ours.std() > 0.1  # or there would be nothing to compare
    if norm == "s-norm":
        cohort = read_cohort(output / "save" / "train.csv")
        cohort = extract(cohort, np.arange(len(cohort)))[0].vectors
        mean, deviation = cohort_statistics(embeddings, cohort, COHORT)
        ours = adaptive_s_norm(ours, trials, mean, deviation)

    rows = [row.split() for row in open(output / "scores.txt")]
    names = [name.removesuffix(".wav") for name in trials.utterances]
    assert [row[:2] for row in rows] == [
        [names[first], names[second]]
        for first, second in zip(trials.enrolment, trials.test)
    ]
    theirs = [float(row[3]) for row in rows]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    # The script takes a threshold of its list, ours lies between two.
    step = 100 / min(trials.labels.sum(), (~trials.labels).sum())
    assert abs(100 * eer(ours, trials.labels)[0] - rate) <= step


def read_cohort(path):
    """The pieces that the script's csv names."""
    with open(path, newline="", encoding="utf-8") as source:
        rows = list(csv.DictReader(source))
    assert len(rows) > COHORT
    return Manifest.of(
        (
            row["ID"],
            row["wav"],
            int(row["start"]) / RATE,
            (int(row["stop"]) - int(row["start"])) / RATE,
            "",
        )
        for row in rows
    )


@of_speechbrain
def test_every_key_of_the_yaml_is_read():
    """By the script, by SpeechBrain, or by another key."""
    text = YAML.read_text(encoding="utf-8")
    code = (SCRIPTS / "speaker_verification_cosine.py").read_text("utf-8")
    for key in re.findall(r"^([a-z]\w*):", text, flags=re.MULTILINE):
        assert f'"{key}"' in code or f"<{key}>" in text, f"{key} is not read"
