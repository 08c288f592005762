"""A tiny corpus and a tiny run of the real recipe, shared by the tests."""

import pathlib
import subprocess
import sys

import pytest
from kill import tiny_corpus  # of tests/

ROOT = pathlib.Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "VoxCeleb" / "LGL"

TINY = [
    "--batch_size=8",
    "--dataloader_options={num_workers: 0}",
    "--crop_seconds=0.5",
    "--new_encoder={channels: [16, 16, 16, 16, 48], attention_channels: 16}",
    "--device=cpu",
    "--noprogressbar",
]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Five speakers to train on, two to test on."""
    folder = tmp_path_factory.mktemp("corpus")
    tiny_corpus(folder)
    return folder


def train(yaml, corpus, output, *options, check=True, timeout=300):
    """Runs the recipe as a user does, in the recipe's folder."""
    # SpeechBrain takes a key only once: of two values, the later one.
    options = [
        *TINY,
        f"--data_folder={corpus}",
        f"--train_folder={corpus}/wav",
        f"--trial_folder={corpus}/wav",
        f"--output_folder={output}",
        *options,
    ]
    options = {option.split("=")[0]: option for option in options}
    command = [sys.executable, "train_lgl.py", f"hparams/{yaml}"]
    command.extend(options.values())
    done = subprocess.run(
        command, cwd=RECIPE, capture_output=True, text=True, timeout=timeout
    )
    if check and done.returncode:
        raise AssertionError(done.stdout[-3000:] + done.stderr[-3000:])
    return done


STAGE1 = ["--number_of_epochs=2"]
STAGE2 = [
    "--n_iterations=2",
    "--n_clusters=5",
    "--classifier_epochs=1",
    "--gated_epochs=1",
]


@pytest.fixture(scope="session")
def stage1_run(corpus, tmp_path_factory):
    """A finished Stage I."""
    output = tmp_path_factory.mktemp("run")
    train("small_stage1.yaml", corpus, output, *STAGE1)
    return output


@pytest.fixture(scope="session")
def run(corpus, stage1_run):
    """A finished run of both stages."""
    train("small_stage2.yaml", corpus, stage1_run, *STAGE2)
    return stage1_run
