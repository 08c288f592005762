"""Fits a Brain on the crops of a session's utterances."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from speechbrain.utils.epoch_loop import EpochCounter

from lgl_plugin.dataio.dataset import SECONDS_PER_BATCH, crop_dataset
from lgl_plugin.dataio.sampler import ShardSampler, shard_numbers
from lgl_plugin.runs.checkpoints import WholeCheckpointer
from lgl_plugin.training.brain import SpeakerBrain
from lgl_plugin.training.epoch_selection import SAMPLE, ClusterFigures
from lgl_plugin.training.session import Session
from lgl_plugin.utils.signals import own_process_group


def fit(
    session: Session,
    brain_class: type[SpeakerBrain],
    modules: dict[str, torch.nn.Module],
    folder: pathlib.Path,
    epochs: int,
    labels: np.ndarray | None = None,
    rows: np.ndarray | None = None,
    crop_seconds: float | None = None,
    epochs_before: int = 0,
    remark: Callable[[SpeakerBrain], dict] | None = None,
    **context: Any,
) -> SpeakerBrain:
    """Trains modules and leaves those of the chosen epoch in them.

    Arguments
    ---------
    session : Session
        Settings, data and run folder.
    brain_class : type
        SimCLRBrain or LossGatedBrain.
    modules : dict
        Its modules, apart from augmentation. The checkpoint of `encoder` is
        that of its network, so that SpeechBrain loads it.
    folder : pathlib.Path
        For checkpoints.
    epochs : int
        How many.
    labels : numpy.ndarray, optional
        Pseudo-labels by row of the manifest, int64, -1 where there is none.
        With labels the training data has one crop of an utterance, else two.
    rows : numpy.ndarray, optional
        Rows of the manifest to train on; all but those held out, if not
        given.
    crop_seconds : float, optional
        Length of a crop, the yaml's if not given.
    epochs_before : int
        Epochs of the phase that this one goes on from.
    remark : callable, optional
        Takes the brain after an epoch, returns more for its record.
    **context
        What each record of metrics.jsonl says beside the figures.

    Returns
    -------
    SpeakerBrain
        After the fit.
    """
    settings = session.settings
    modules = {"augment": settings.augment, **modules}
    counter = EpochCounter(epochs)
    figures = ClusterFigures(session.device)
    kept = {**modules, "embedding_model": modules["encoder"].network}
    del kept["encoder"]
    kept = {name: part for name, part in kept.items() if part.state_dict()}
    checkpointer = WholeCheckpointer(
        folder / "checkpoints",
        {**kept, "counter": counter, "clusters": figures},
    )
    crop = crop_seconds or settings.crop_seconds
    seed = int(os.environ["SB_GLOBAL_SEED"])  # which SpeechBrain's samplers use
    data = session.manifest
    train = crop_dataset(
        data,
        session.train_rows if rows is None else rows,
        crop,
        2 if labels is None else 1,
        labels,
        settings.sample_rate,
        seed,
    )
    if len(train) < session.batch_size:  # the last, smaller batch is left out
        raise ValueError(
            f"{context['phase']}: {len(train)} utterances make no batch of "
            f"{session.batch_size}, so nothing would be trained. Lower "
            "batch_size."
        )
    order, sampler = {"shuffle": True}, None
    if data.places is not None:
        sampler = ShardSampler(
            shard_numbers(data.wavs)[train.data_ids], seed=seed
        )
        order = {"sampler": sampler}

    def log(record):
        if remark is not None:
            record = {**record, **remark(brain)}
        session.log(**context, **record)
        phase = folder.relative_to(session.run.folder).as_posix()
        session.show(phase, record)

    brain = brain_class(
        modules,
        settings.opt_class,
        session.brain_settings,
        session.run_opts,
        checkpointer,
        bad_files=session.bad_files,
        log=log,
        examine=_examiner(session, figures),
        train_data=train,
        train_sampler=sampler,
        epochs_before=epochs_before,
        seed=seed,
    )
    loader = dict(settings.dataloader_options)
    options = {
        # From pinned memory the GPU fetches a batch while it still computes.
        "pin_memory": torch.device(session.device).type == "cuda",
        "worker_init_fn": own_process_group,
        **loader,
    }
    if loader["num_workers"]:
        options.setdefault("timeout", SECONDS_PER_BATCH)
    brain.fit(
        counter,
        train,
        # The same crops at every epoch of every phase.
        crop_dataset(
            data, session.held_out_rows, crop, 2, None, settings.sample_rate
        ),
        train_loader_kwargs={**options, **order, "drop_last": True},
        valid_loader_kwargs=options,
    )
    checkpointer.recover_if_possible(min_key="criterion")
    return brain


def _examiner(session, figures):
    """Makes what measures an epoch's encoder, as `selection` asks."""
    settings = session.settings
    study = settings.selection_study
    clusters = study or settings.selection in ("silhouette", "agreement")
    # The same utterances at every phase, whatever was drawn before.
    rng = np.random.default_rng(settings.seed)
    rows = rng.permutation(session.rows)[:SAMPLE]

    def examine(encoder):
        found = {}
        if clusters:
            vectors = session.embed(encoder, rows).vectors
            found.update(figures(np.array(vectors)))
        if study:
            found.update(session.score(encoder))
        return found

    return examine
