"""Estimates the cost of training from a few timed steps, for `lgl check`."""

from __future__ import annotations

import logging
import pathlib
import random
from typing import Any

import numpy as np

from lgl_plugin.cli.train import stages
from lgl_plugin.dataio.manifest import write_part
from lgl_plugin.evaluation.observer import observer_of
from lgl_plugin.methods.stage1 import Stage1Brain
from lgl_plugin.runs.arguments import key_of, parse_arguments
from lgl_plugin.runs.schema import Settings
from lgl_plugin.runs.settings import load_settings
from lgl_plugin.training.estimate import (
    peak_memory,
    seconds_per_step,
    speech_per_second,
)
from lgl_plugin.training.loss_gated import LossGatedBrain
from lgl_plugin.training.session import Session
from lgl_plugin.training.stage1 import stage1_modules
from lgl_plugin.training.stage2 import stage2_modules
from lgl_plugin.training.start import made_to_train
from lgl_plugin.utils.device import check_device

STEPS = 5  # timed steps, after a first step that allocates memory


def check_cost(
    audio: str,
    folder: pathlib.Path,
    made: dict,
    choices: dict,
    given: list[str],
) -> None:
    """Times steps of each stage and prints the cost.

    Raises ValueError if the settings, the audio or the machine do not suffice.
    """
    # Without the stages' notices, which would be about a run.
    logging.disable(logging.INFO)
    hours, n_phases, costs = {}, 0, {1: cost_of_stage1, 2: cost_of_stage2}
    # A sample of the manifest, with its channel, replaces manifest and channel.
    # The sample lacks most labelled utterances, and bad files may be a larger
    # share of it.
    replaced = "manifest", "channel", "labels_file", "max_bad_share"
    given = [w for w in given if key_of(w) not in replaced]
    given.append("--max_bad_share=1.0")
    try:
        for stage in stages(choices, audio, folder / "run", given):
            session = open_session(folder, made["kept"], *stage)
            hours |= costs[session.settings.stage](session, made)
            n_phases += phases(session.settings)
    except ValueError as error:
        raise ValueError(f"training cannot begin yet: {error}") from error
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
    # A phase leaves its weights, and checkpoints: those that are kept, and one
    # more. A checkpoint has the trained weights and Adam's two moments.
    checkpoints = 3 * trained * (settings.keep_checkpoints + 1)
    disk = n_phases * (weights + checkpoints) + settings.n_iterations * vectors
    print(f"Disk       about {disk / 2**30:.2f} GiB")
    held, on_gpu = peak_memory(session.device)
    gpu = f", {on_gpu / 2**30:.1f} GiB of the GPU's" if on_gpu else ""
    if held is not None:
        held += 2 * vectors  # clustering needs them and a normalised copy
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
    words = [str(yaml), *options, "--debug", "--debug_epochs=1"]
    words.append("--noprogressbar")
    path, run_opts, overrides = parse_arguments(words, usual)
    settings, _ = load_settings(path, overrides, run_opts)
    steps = STEPS + 1
    if check_device(run_opts.get("device")) != "cpu":
        # A GPU may have to wait for audio. After the batches that were read in
        # advance, two batches of each loader process show how long.
        loader = settings.dataloader_options
        steps += loader.read_ahead + 2 * loader.num_workers
    words.append(f"--debug_batches={steps}")
    # Twice the factor, because some utterances are held out.
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
    settings = session.settings
    modules = stage1_modules(session)
    context = {"stage": 1, "phase": modules["method"].name}
    seconds = seconds_per_step(session, Stage1Brain, modules, **context)
    print(f"Step       {seconds:.2f} s in Stage I")
    epochs = settings.number_of_epochs + settings.ssps_epochs
    steps = epochs * session.steps_per_epoch(made["kept"])
    return {"Stage I": steps * seconds / 3600}


def cost_of_stage2(session: Session, made: dict) -> dict[str, float]:
    """Times Stage II; returns its hours.

    The last round is timed separately if it has an encoder of its own.
    """
    settings = session.settings
    n_rounds, wide = settings.n_iterations, settings.new_last_encoder
    # The number of clusters hardly changes the time, so "auto" is guessed.
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
    # An upper limit: the fine-tuning reads only what the gate selects. The time
    # of a step grows with the length of its crops.
    longer = settings.large_margin_crop_seconds / settings.crop_seconds
    seconds += last * longer * settings.large_margin_epochs / epochs
    speed = speech_per_second(session, settings.new_encoder())
    print(f"Embedding  {speed:,.0f} s of speech a second")
    return {
        "Stage II without clustering": steps * seconds / 3600,
        "embedding": n_rounds * made["hours"] / speed,
    }
