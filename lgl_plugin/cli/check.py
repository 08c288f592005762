"""`lgl check`: tells what a folder of audio holds and what training it costs.

> lgl check /my/audio
> lgl check /my/audio --preset=paper --device=cuda
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shlex
from typing import TYPE_CHECKING, Any

from lgl_plugin.cli.common import show_notices
from lgl_plugin.cli.train import (
    add_preset,
    as_pairs,
    check_files,
    parse,
    stages,
    suggest,
)
from lgl_plugin.runs.arguments import key_of

if TYPE_CHECKING:
    from lgl_plugin.dataio.manifest import Manifest
    from lgl_plugin.runs.schema import Settings
    from lgl_plugin.training.session import Session

STEPS = 5  # timed, after a first one that allocates
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
    import tempfile

    show_notices()
    given = [word for word in as_pairs(settings) if word != "--debug"]
    # The run's own folder stays as it is.
    of_run = [word for word in given if key_of(word) == "output_folder"]
    given = [word for word in given if word not in of_run]
    of_run = of_run or ["--output_folder=RUN"]
    words = ["lgl", "train", audio, *of_run, *given]
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
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
        # With room for files that turn out to be silent when they are read.
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


def check_audio(
    settings: Settings, folder: pathlib.Path
) -> tuple[dict, Manifest]:
    """Prints what there is to train on.

    Returns what `prepare_manifest` does, and the manifest. One of the user's
    own is taken as it is, and copied to the folder.
    """
    import collections
    import shutil

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
    if narrow := made.get("narrow"):  # a manifest of one's own has no rates
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
    """Refuses by training's own checks what training would refuse.

    The timed sample is too small to tell. What takes an encoder's work, such
    as scoring the trial list, is left to training.
    """
    from lgl_plugin.training.sizes import split_rows
    from lgl_plugin.training.stage1 import check_grouping
    from lgl_plugin.training.start import (
        check_inputs,
        check_weights,
        given_weights,
    )

    number = len(manifest)
    for settings in of_stages:
        rows, _ = split_rows(settings, number)
        if settings.stage == 1:
            if settings.ssps_epochs:
                check_grouping(settings, len(rows))
            continue
        check_inputs(settings, manifest)
        if given := given_weights(settings.pretrained_encoder):
            check_weights(settings, given)


def show_machine() -> None:
    """Prints what the machine has."""
    import shutil

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
    found = ", ".join(f"{name} {n}" for name, n in versions().items())
    print(f"Versions   {found}")


def check_cost(
    audio: str,
    folder: pathlib.Path,
    made: dict,
    choices: dict,
    given: list[str],
) -> None:
    """Times steps of each stage and prints the cost.

    ValueError if the settings, the audio or the machine will not do.
    """
    import logging

    from lgl_plugin.training.estimate import peak_memory
    from lgl_plugin.training.start import made_to_train

    # The stages' own notices are those of the run to come.
    logging.disable(logging.INFO)
    hours, n_phases, costs = {}, 0, {1: cost_of_stage1, 2: cost_of_stage2}
    # A sample of the manifest, which names the channel, takes their place. It
    # lacks most of the labelled utterances, and may have the bad ones.
    replaced = "manifest", "channel", "labels_file", "max_bad_share"
    given = [w for w in given if key_of(w) not in replaced]
    given.append("--max_bad_share=1.0")
    try:
        for stage in stages(choices, audio, folder / "run", given):
            session = open_session(folder, made["kept"], *stage)
            hours |= costs[session.settings.stage](session, made)
            n_phases += phases(session.settings)
    except ValueError as error:
        raise ValueError(f"this will not do yet: {error}") from error
    finally:
        logging.disable(logging.NOTSET)
    parts = ", ".join(f"{part} {time:.1f}" for part, time in hours.items())
    print(f"Time       about {sum(hours.values()):.1f} hours ({parts})")
    settings = session.settings
    vectors = 4 * made["kept"] * settings.embedding_size
    last = settings.new_last_encoder or settings.new_encoder
    encoder = made_to_train(settings, last)
    sizes = [(p.requires_grad, 4 * p.numel()) for p in encoder.parameters()]
    weights = sum(size for _, size in sizes)
    trained = sum(size for is_trained, size in sizes if is_trained)
    # A phase leaves its weights, the checkpoints of some epochs and of one
    # under way, each of the trained weights and both of Adam's moments.
    checkpoints = 3 * trained * (settings.keep_checkpoints + 1)
    disk = n_phases * (weights + checkpoints) + settings.n_iterations * vectors
    print(f"Disk       about {disk / 2**30:.2f} GiB")
    held, on_gpu = peak_memory(session.device)
    gpu = f", {on_gpu / 2**30:.1f} GiB of the GPU's" if on_gpu else ""
    if held is not None:
        held += 2 * vectors  # clustering holds them and a normalised copy
        print(f"Memory     about {held / 2**30:.1f} GiB{gpu}")


def phases(settings: Settings) -> int:
    """Counts the steps of a stage that train."""
    if settings.stage == 1:
        return 1 + bool(settings.ssps_epochs)
    return 2 * settings.n_iterations + bool(settings.large_margin_epochs)


def open_session(
    folder: pathlib.Path,
    n_kept: int,
    yaml: pathlib.Path,
    options: list[str],
    usual: dict[str, Any],
) -> Session:
    """Opens a stage's session on a few of the folder's `n_kept` files."""
    import random

    from lgl_plugin.dataio.manifest import write_part
    from lgl_plugin.evaluation.observer import observer_of
    from lgl_plugin.runs.arguments import parse_arguments
    from lgl_plugin.runs.settings import load_settings
    from lgl_plugin.training.session import Session
    from lgl_plugin.utils.device import check_device

    words = [str(yaml), *options, "--debug", "--debug_epochs=1"]
    words.append("--noprogressbar")
    path, run_opts, overrides = parse_arguments(words, usual)
    settings, _ = load_settings(path, overrides, run_opts)
    steps = STEPS + 1
    if check_device(run_opts.get("device")) != "cpu":
        # A GPU may have to wait for audio: behind what was read ahead, two
        # batches of each of the loader's processes tell how long.
        loader = settings.dataloader_options
        steps += loader.read_ahead + 2 * loader.num_workers
    words.append(f"--debug_batches={steps}")
    # Twice the factor: some are held out.
    steps = max(steps + 1, 2 * (settings.grad_accumulation_factor or 1))
    n_rows = steps * settings.dataloader_options.batch_size
    sample = folder / f"sample{n_rows}.csv"
    rows = random.Random(0).sample(range(n_kept), min(n_rows, n_kept))
    write_part(folder / "manifest.csv", sample, sorted(rows))
    _, run_opts, overrides = parse_arguments(
        words, usual | {"manifest": sample}
    )
    loaded = load_settings(path, overrides, run_opts)
    session = Session(*loaded, run_opts, observer_of)
    session.seed(1)
    return session


def cost_of_stage1(session: Session, made: dict) -> dict[str, float]:
    """Times Stage I; returns its hours."""
    from lgl_plugin.methods.stage1 import Stage1Brain
    from lgl_plugin.training.estimate import seconds_per_step
    from lgl_plugin.training.stage1 import stage1_modules

    settings = session.settings
    modules = stage1_modules(session)
    context = {"stage": 1, "phase": modules["method"].name}
    seconds = seconds_per_step(session, Stage1Brain, modules, **context)
    print(f"Step       {seconds:.2f} s in Stage I")
    epochs = settings.number_of_epochs + settings.ssps_epochs
    steps = epochs * session.steps_per_epoch(made["kept"])
    return {"Stage I": steps * seconds / 3600}


def cost_of_stage2(session: Session, made: dict) -> dict[str, float]:
    """Times Stage II, its last round apart if that is wider."""
    import numpy as np

    from lgl_plugin.training.estimate import seconds_per_step, speech_per_second
    from lgl_plugin.training.loss_gated import LossGatedBrain
    from lgl_plugin.training.stage2 import stage2_modules
    from lgl_plugin.training.start import made_to_train

    settings = session.settings
    n_rounds, wide = settings.n_iterations, settings.new_last_encoder
    # How many an estimate gives hardly changes the time.
    auto = settings.n_clusters == "auto"
    n_clusters = len(session.rows) // 10 + 2 if auto else settings.n_clusters
    labels = np.arange(len(session.rows)) % n_clusters
    epochs = settings.classifier_epochs + settings.gated_epochs
    steps = epochs * session.steps_per_epoch(made["kept"])

    def seconds_of(new_encoder, words):
        encoder = made_to_train(settings, new_encoder)
        classifier = settings.new_classifier(out_neurons=n_clusters)
        modules = stage2_modules(settings, encoder, classifier)
        context = {"stage": 2, "iteration": 1, "phase": "classifier"}
        seconds = seconds_per_step(
            session, LossGatedBrain, modules, labels=labels, **context
        )
        print(f"Step       {seconds:.2f} s in {words}")
        return seconds

    last = seconds_of(settings.new_encoder, "Stage II")
    seconds = n_rounds * last
    if wide is not None:
        last = seconds_of(wide, "Stage II's last round")
        seconds += last - seconds / n_rounds
    # At most: on what the gate selects. A step is as long as its crops.
    longer = settings.large_margin_crop_seconds / settings.crop_seconds
    seconds += last * longer * settings.large_margin_epochs / epochs
    speed = speech_per_second(session, settings.new_encoder())
    print(f"Embedding  {speed:,.0f} s of speech a second")
    return {
        "Stage II without clustering": steps * seconds / 3600,
        "embedding": n_rounds * made["hours"] / speed,
    }
