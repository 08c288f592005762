"""`lgl check`: tells what a folder of audio holds and what training it costs.

> lgl check /my/audio
> lgl check /my/audio --preset=paper --device=cuda
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import pathlib
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lgl_plugin.cli.common import show_notices
from lgl_plugin.cli.train import (
    add_preset,
    as_pairs,
    check_files,
    parse,
    suggest,
)
from lgl_plugin.runs.arguments import key_of
from lgl_plugin.utils.errors import EXPLAINED, logged_message

if TYPE_CHECKING:
    from lgl_plugin.dataio.manifest import Manifest
    from lgl_plugin.runs.schema import Settings

SHOWN = 20  # bad files that are named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    parser.usage = "lgl check AUDIO [--preset {small,paper}] [--KEY=VALUE ...]"
    parser.add_argument("audio", help="folder of audio, one speaker a file")
    add_preset(parser)
    parser.epilog = "Keys and options follow as for `lgl train`."
    parser.set_defaults(settings=None)


def run(audio: str, preset: str | None, settings: list[str] | None) -> None:
    """Prints counts, the machine, and an estimate by steps of the preset."""
    from lgl_plugin.cli.cost import check_cost

    show_notices()
    given = [word for word in as_pairs(settings) if word != "--debug"]
    # The trial uses a scratch folder: that of the run is not touched.
    of_run = [word for word in given if key_of(word) == "output_folder"]
    given = [word for word in given if word not in of_run]
    of_run = of_run or ["--output_folder=RUN"]
    words = ["lgl", "train", audio, *of_run, *given]
    with scratch() as folder:
        choices = {"preset": preset or "small", "n_clusters": 2}
        run = folder / "run"
        parsed, of_stages = parse(choices, audio, run, given)
        of_data = of_stages[0]
        check_files(of_stages[-1])
        made, manifest = check_audio(of_data, folder)
        show_machine()
        device = parsed[0][1].get("device")
        choices = suggest(made["kept"], made["hours"], preset, device)
        _, of_stages = parse(choices, audio, run, given)
        check_stages(of_stages, manifest)
        check_cost(audio, folder, made, choices, given)
    if preset is not None:
        words.append(f"--preset={preset}")
    bad = made["bad"] + made["short"]
    is_too_bad = bad > of_data.max_bad_share * made["found"]
    if is_too_bad:
        # Some percent more, for files that are found silent when they are read.
        share = min((100 * bad // made["found"] + 4) / 100, 1.0)
        words = [w for w in words if key_of(w) != "max_bad_share"]
        words.append(f"--max_bad_share={share}")
        print(
            f"Not yet    {bad:,} files are bad, more than max_bad_share="
            f"{of_data.max_bad_share} allows: mend them, or train without them"
        )
    print("Train it with:", shlex.join(words))
    if is_too_bad:
        raise SystemExit(1)  # for scripts: `lgl check A && lgl train A ...`


@contextlib.contextmanager
def scratch() -> Iterator[pathlib.Path]:
    """Makes a temporary folder; keeps it if an error message names it.

    Notices that name the folder are not shown.
    """
    folder = tempfile.mkdtemp(prefix="lgl-check-")
    notices = logging.getLogger("lgl_plugin.dataio.prepare")

    def outlasts(record):
        return folder not in record.getMessage()

    notices.addFilter(outlasts)
    named = False
    try:
        yield pathlib.Path(folder)
    except EXPLAINED as error:
        named = folder in logged_message(error)
        raise
    finally:
        notices.removeFilter(outlasts)
        if not named:
            shutil.rmtree(folder)


def check_audio(
    settings: Settings, folder: pathlib.Path
) -> tuple[dict, Manifest]:
    """Prints what audio there is to train on.

    Returns the result of `prepare_manifest`, and the manifest. A user's own
    manifest is used unchanged, and copied to the folder.
    """
    import collections

    import numpy as np

    from lgl_plugin.dataio.bad_files import BadFiles
    from lgl_plugin.dataio.folder import UNREAD
    from lgl_plugin.dataio.manifest import run_manifest
    from lgl_plugin.dataio.prepare import prepare_manifest
    from lgl_plugin.training.data import try_manifest

    path = folder / "manifest.csv"
    if settings.manifest:
        manifest = run_manifest(folder, vars(settings))
        limit = int(settings.max_bad_share * len(manifest))
        bad_files = BadFiles(folder / "bad_files.txt", limit)
        try_manifest(settings, manifest, bad_files)  # as training does
        shutil.copy(settings.manifest, path)
        made = {"bad": 0, "short": 0, "passed_over": {}}
        made["found"] = made["kept"] = len(manifest)
        made["hours"] = float(manifest.durations.sum()) / 3600
    else:
        made = prepare_manifest(
            settings.train_folder,
            path,
            settings.data_folder,
            speaker_folder=False,
            trials=settings.verification_file,
            trial_folder=settings.trial_folder,
            max_bad_share=1.0,
            sample_rate=settings.sample_rate,
            channel=settings.channel,
        )
        manifest = run_manifest(folder, vars(settings))
    formats = collections.Counter(
        pathlib.PurePath(name).suffix.lower() for name in manifest.wavs
    )
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in formats.most_common())
    low, middle, high = np.quantile(manifest.durations, [0.05, 0.5, 0.95])
    print(
        f"Audio      {made['kept']:,} files, {made['hours']:.2f} hours: {kinds}"
    )
    print(
        f"Durations  {middle:.1f} s in the middle, 5 % under {low:.1f} s, 5 % "
        f"over {high:.1f} s"
    )
    if narrow := made.get("narrow"):  # a user's own manifest has no rates
        print(
            f"Rates      {narrow:,} files below {settings.sample_rate} Hz, the "
            f"lowest {made['lowest_rate']} Hz"
        )
    if made["bad"] or made["short"]:
        lines = (folder / "bad_files.txt").read_text("utf-8").splitlines()
        print(
            f"Bad        {made['bad']:,} cannot be used, {made['short']:,} are "
            f"too short; the first {len(lines[:SHOWN])}:"
        )
        for line in lines[:SHOWN]:
            print(f"           {line.replace(chr(9), ': ')}")
    passed_over = dict(made["passed_over"])
    if hidden := passed_over.pop("hidden", 0):
        print(f"Hidden     {hidden:,} files and folders are not looked at")
    hint = ", left out until they are wav, flac, ogg or mp3"
    for title, convertible in ("Convert", True), ("Others", False):
        kinds = [
            f"{n:,} {extension}"
            for extension, n in passed_over.items()
            if (extension in UNREAD) == convertible
        ]
        if kinds:
            print(f"{title:<11}{', '.join(kinds)}{hint * convertible}")
    return made, manifest


def check_stages(of_stages: list[Settings], manifest: Manifest) -> None:
    """Refuses what training would refuse, by training's own checks.

    The timed sample is too small for these checks. Checks that must run an
    encoder, such as scoring the trial list, are left to training.
    """
    from lgl_plugin.training.sizes import split_rows, warn_of_short
    from lgl_plugin.training.stage1 import check_grouping
    from lgl_plugin.training.start import (
        check_inputs,
        check_weights,
        given_weights,
    )

    number = len(manifest)
    for settings in of_stages:
        rows, _ = split_rows(settings, number)
        warn_of_short(settings, manifest)
        if settings.stage == 1:
            if settings.ssps_epochs:
                check_grouping(settings, len(rows))
            continue
        check_inputs(settings, manifest)
        if given := given_weights(settings.pretrained_encoder):
            check_weights(settings, given)


def show_machine() -> None:
    """Prints the machine's CPU, GPU, shared memory and versions."""
    import torch

    from lgl_plugin.runs.provenance import device_name, versions

    waiting = "OpenMP's default"
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        if name in os.environ:
            waiting = f"{name}={os.environ[name]}"
    print(
        f"CPU        {device_name('cpu')}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, waiting by {waiting}"
    )
    gpus = [device_name(f"cuda:{n}") for n in range(torch.cuda.device_count())]
    print(f"GPU        {', '.join(gpus) or 'none that torch sees'}")
    try:
        shared = f"{shutil.disk_usage('/dev/shm').free / 2**30:.1f} GiB free"
    except OSError:
        shared = "none on this system"
    print(f"/dev/shm   {shared}")
    packages = ", ".join(f"{name} {n}" for name, n in versions().items())
    print(f"Versions   {packages}")
