"""Runs the real recipe at a tiny size, for the integration tests."""

import contextlib
import io
import pathlib
import runpy
import subprocess
import sys
from unittest import mock

import train_lgl  # of the recipe's folder

from lgl_plugin.dataio import prepare
from lgl_plugin.utils.errors import TrainingFailed

ROOT = pathlib.Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "VoxCeleb" / "LGL"

TINY = [
    "--batch_size=8",
    "--steps_per_epoch=null",
    "--lr_annealing={warmup: 0.0, final: 1.0}",  # so few steps learn little
    "--dataloader_options={num_workers: 0}",
    "--crop_seconds=0.5",
    "--new_encoder={network: {channels: [16, 16, 16, 16, 48], "
    "attention_channels: 16}}",
    "--device=cpu",
    "--noprogressbar",
]
STAGE1 = ["--number_of_epochs=2", "--ssps_epochs=0"]
STAGE2 = [
    "--n_iterations=2",
    "--n_clusters=5",
    "--classifier_epochs=1",
    "--gated_epochs=1",
    "--encoder_init=previous",
    "--classifier_init=centroids",  # a head start for so few steps
    "--balanced_sampling=False",  # an epoch of so few would leave many out
]


def words(yaml, corpus, output, *options):
    """What a user types after `python`, in the recipe's folder."""
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
    return ["train_lgl.py", f"hparams/{yaml}", *options.values()]


def train(yaml, corpus, output, *options, check=True, timeout=300):
    """Runs the recipe as a user does."""
    command = [sys.executable, *words(yaml, corpus, output, *options)]
    done = subprocess.run(
        command, cwd=RECIPE, capture_output=True, text=True, timeout=timeout
    )
    if check and done.returncode:
        raise AssertionError(done.stdout[-3000:] + done.stderr[-3000:])
    return done


def train_here(yaml, corpus, output, *options, page=False):
    """Runs the recipe in this process, whose current folder stays.

    Without the page, which takes longer than all of a tiny run.
    """
    script, _, *rest = words(yaml, corpus, output, *options)
    typed = [script, str(RECIPE / "hparams" / yaml), *rest]
    write = train_lgl.try_to_write_report if page else id
    with (
        mock.patch.object(sys, "argv", typed),
        mock.patch.object(train_lgl, "try_to_write_report", write),
        # Eight would take half a second to start.
        mock.patch.object(prepare, "WORKERS", 1),
    ):
        try:
            train_lgl.main()
        except SystemExit as end:  # what the user is told of is an error
            error = end.__context__ or end
            if isinstance(error, TrainingFailed):
                error = error.__cause__
            raise error from None


def run_script(path, *arguments):
    """Runs a script in this process; returns what it printed."""
    printed = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [str(path), *map(str, arguments)]),
        contextlib.redirect_stdout(printed),
    ):
        runpy.run_path(str(path), run_name="__main__")
    return printed.getvalue()
