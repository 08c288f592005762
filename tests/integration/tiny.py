"""Runs the real recipe at a tiny size, for the integration tests."""

import pathlib
import subprocess
import sys

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
