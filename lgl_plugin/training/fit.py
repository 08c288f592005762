"""Fits a Brain on the crops of a session's utterances."""

import itertools
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from speechbrain.utils.epoch_loop import EpochCounter
from speechbrain.utils.logger import get_logger

from lgl_plugin.dataio.dataset import crop_dataset, loader_options
from lgl_plugin.dataio.partners import Partners
from lgl_plugin.dataio.sampler import PassSampler, shard_numbers
from lgl_plugin.nnet.schedules import lr_groups
from lgl_plugin.runs.checkpoints import WholeCheckpointer, hooks_without
from lgl_plugin.runs.metrics_log import figures_text
from lgl_plugin.training.brain import SpeakerBrain
from lgl_plugin.training.epoch_selection import SAMPLE, ClusterFigures
from lgl_plugin.training.session import Session

logger = get_logger(__name__)


def fit(
    session: Session,
    brain_class: Callable[..., SpeakerBrain],
    modules: dict[str, torch.nn.Module],
    folder: pathlib.Path,
    epochs: int,
    *,
    phase: str,
    labels: np.ndarray | None = None,
    rows: np.ndarray | None = None,
    crop_seconds: float | None = None,
    partners: Partners | None = None,
    epochs_before: int = 0,
    epochs_in_all: int | None = None,
    remark: Callable[[SpeakerBrain], dict] | None = None,
    **context: Any,
) -> SpeakerBrain:
    """Trains modules, which then have the weights of the chosen epoch.

    Arguments
    ---------
    session : Session
        Settings, data and run folder.
    brain_class : callable
        Makes the Brain: Stage1Brain, SSPSBrain or LossGatedBrain, with further
        arguments bound.
    modules : dict
        The Brain's modules, without augmentation. The checkpoint of `encoder`
        is that of its network, so that SpeechBrain can load it.
    folder : pathlib.Path
        Folder of the step in the run folder; it will contain the checkpoints.
    epochs : int
        Number of epochs.
    phase : str
        Name of this training in metrics.jsonl.
    labels : numpy.ndarray, optional
        Pseudo-labels by row of the manifest, int64, -1 for none. With labels
        the training data has one crop of an utterance, otherwise two.
    rows : numpy.ndarray, optional
        Rows of the manifest to train on; by default all rows that are not held
        out.
    crop_seconds : float, optional
        Length of a crop; by default the yaml's.
    partners : lgl_plugin.dataio.partners.Partners, optional
        Partners, from which each utterance draws another one for its second
        crop.
    epochs_before : int
        Epochs of earlier phases, whose learning-rate schedule this phase
        continues.
    epochs_in_all : int, optional
        Epochs of all phases that share one learning-rate schedule; by default
        up to the end of this phase.
    remark : callable, optional
        Takes the brain after an epoch, and returns further entries of its
        record.
    **context
        Further entries of each record of metrics.jsonl, such as the stage.

    Returns
    -------
    SpeakerBrain
        The Brain after the fit.

    Raises
    ------
    ValueError
        If there are too few utterances for a batch.
    """
    settings = session.settings
    modules = {"augment": settings.augment, **modules}
    counter = EpochCounter(epochs)
    figures = ClusterFigures(session.device)
    checkpointer = _checkpointer(
        folder / "checkpoints", modules, counter=counter, clusters=figures
    )
    crop = crop_seconds or settings.crop_seconds
    seed = session.step_seed
    train = crop_dataset(
        session.manifest,
        session.train_rows if rows is None else rows,
        crop,
        n_crops=2 if labels is None else 1,
        labels=labels,
        sample_rate=settings.sample_rate,
        seed=seed,
        speeds=settings.speeds if labels is None else (100,),
        partners=partners,
        overlap=labels is None and settings.overlapping_crops,
    )
    if len(train) < session.batch_size:
        raise ValueError(
            f"{phase}: {len(train)} utterances make no batch of "
            f"{session.batch_size}, so nothing would be trained. Lower "
            "batch_size."
        )
    # All epochs of all phases use the same crops: SpeechBrain reads this data
    # in order, that is in the first pass.
    valid = crop_dataset(
        session.manifest,
        session.held_out_rows,
        crop,
        n_crops=2,
        sample_rate=settings.sample_rate,
    )
    shards = None
    if session.manifest.places is not None:
        shards = shard_numbers(session.manifest.wavs)[train.data_ids]
    steps = session.steps_per_epoch(len(train))
    length = steps * session.batch_size
    classes = None
    if labels is not None and settings.balanced_sampling:
        classes = labels[train.data_ids]
    sampler = PassSampler(len(train), length, seed, shards, classes)

    def log(record):
        if remark is not None:
            record = {**record, **remark(brain)}
        session.log(**context, phase=phase, **record)
        step = folder.relative_to(session.run.folder).as_posix()
        session.show(step, record)
        # The seconds include the held-out crops, which are already embedded.
        seconds_left = brain.tally.seconds * (epochs - record["epoch"])
        logger.info(epoch_line(step, record, epochs, seconds_left))

    brain = brain_class(
        modules,
        _opt_class(settings.opt_class, modules["encoder"].network),
        session.brain_settings,
        session.run_opts,
        checkpointer,
        bad_files=session.bad_files,
        log=log,
        examine=_examiner(session, figures),
        train_sampler=sampler,
        steps_per_epoch=steps,
        epochs_before=epochs_before,
        epochs_in_all=epochs_in_all or epochs_before + epochs,
        keep_checkpoints=settings.keep_checkpoints,
        batch_size=session.batch_size,
        seed=seed,
    )
    user_options = dict(settings.dataloader_options)
    options = (
        loader_options(session.device, user_options["num_workers"])
        | user_options
    )
    brain.fit(
        counter,
        train,
        valid,
        train_loader_kwargs={**options, "sampler": sampler},
        valid_loader_kwargs=options,
    )
    checkpointer.recover_if_possible(min_key="criterion")
    return brain


def part_of(course: dict[str, int], phase: str) -> dict[str, int]:
    """Returns `fit`'s epoch counts for a phase; {} if `course` lacks it.

    `course` has the epochs of all phases that share one learning-rate schedule.
    """
    if phase not in course:
        return {}
    before = itertools.takewhile(lambda name: name != phase, course)
    return {
        "epochs": course[phase],
        "epochs_before": sum(course[name] for name in before),
        "epochs_in_all": sum(course.values()),
    }


def epoch_line(step: str, record: dict, epochs: int, left: float) -> str:
    """Returns an epoch's line for the screen, without true labels' figures.

    `left` is the remaining time of the phase in seconds.
    """
    names = ("loss", "accuracy", "lr", "pseudo_eer", "utterances_per_second")
    parts = figures_text(record, names)
    if record["epoch"] < epochs:
        size, unit = (3600, "h") if left >= 7200 else (60, "min")
        if left < 120:
            size, unit = 1, "s"
        parts.append(f"{left / size:.0f} {unit} left")
    return f"{step}: epoch {record['epoch']} of {epochs}, {', '.join(parts)}"


def _checkpointer(folder, modules, **further):
    """Makes a checkpointer of all modules with weights, and of `further`."""
    # SpeechBrain's own yamls load an encoder's network under this name.
    name, network = "embedding_model", modules["encoder"].network
    kept = {**modules, name: network}
    del kept["encoder"]
    kept = {name: part for name, part in kept.items() if part.state_dict()}
    checkpointer = WholeCheckpointer(folder, {**kept, **further})
    frozen = {
        key
        for key, weight in network.named_parameters()
        if not weight.requires_grad
        # No name begins with "-", so a network without a pre-trained part
        # matches none.
        and key.startswith(getattr(network, "pretrained", "-"))
    }
    for name, part in kept.items():
        # A teacher also has these weights, in its copy of the encoder.
        excluded = {
            key
            for key in part.state_dict()
            if key.rpartition(".network.")[2] in frozen
        }
        if excluded:
            save, load = hooks_without(excluded, part)
            checkpointer.add_recoverable(name, part, load, save)
    return checkpointer


def _opt_class(opt_class, network):
    """Gives an optimiser parameter groups if the network has several rates."""
    if not hasattr(network, "lr_scales"):
        return opt_class
    scales = network.lr_scales()
    return lambda given: opt_class(lr_groups(given, scales))


def _examiner(session, cluster_figures):
    """Returns a function that measures an epoch's encoder for `selection`."""
    settings = session.settings
    study = settings.selection_study
    clusters = study or settings.selection in ("silhouette", "agreement")
    # Seeded here, so that all phases measure the same utterances.
    rng = np.random.default_rng(settings.seed)
    rows = rng.permutation(session.rows)[:SAMPLE]

    def examine(encoder):
        measured = {}
        if clusters:
            vectors = session.embed(encoder, rows).vectors
            measured.update(cluster_figures(np.array(vectors)))
        if study:
            measured.update(session.score(encoder))
        return measured

    return examine
