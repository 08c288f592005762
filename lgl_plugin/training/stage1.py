"""Stage I: its baselines, its phases, and the clusters of SSPS."""

import functools
import pathlib
from collections.abc import Callable

import numpy as np
import torch

from lgl_plugin.clustering.vectors import nearest_centroids
from lgl_plugin.dataio.partners import Partners
from lgl_plugin.inference.log_mel_baseline import (
    log_mel_encoder,
    log_mel_whitening,
)
from lgl_plugin.runs.metrics_log import LOG_MEL_STATISTICS
from lgl_plugin.runs.run import SCORES
from lgl_plugin.runs.schema import Stage1Settings
from lgl_plugin.runs.weights import BACKEND, ENCODER, load_weights, save_weights
from lgl_plugin.training.brain import SpeakerBrain
from lgl_plugin.training.clusters import pseudo_speakers, whitened_log_mels
from lgl_plugin.training.fit import fit, part_of
from lgl_plugin.training.held_out import separate_generator
from lgl_plugin.training.session import Session
from lgl_plugin.training.sizes import check_twice
from lgl_plugin.utils.distributed import from_main

# File of the method's weights, from which SSPS continues.
METHOD = "method.ckpt"


def score_baselines(session: Session, folder: pathlib.Path) -> None:
    """Logs error rates of log-mel statistics and of the untrained encoder.

    Log-mel statistics are a baseline: means and deviations of log-mel bands,
    whitened by a sample of the corpus. A network that does worse has learnt
    nothing useful. The whitening belongs to the baseline as weights belong to a
    network. The run's back-end is scored on both. Without a trial list nothing
    is logged.
    """
    settings = session.settings

    def log_mel():
        return log_mel_encoder(settings.sample_rate)

    for phase, make, whitening, name in (
        (LOG_MEL_STATISTICS, log_mel, log_mel_whitening(), "floor.npz"),
        ("untrained", settings.new_encoder, None, "untrained.npz"),
    ):
        path = folder / name
        figures = session.score(make(), path, whitening=whitening)
        if figures:
            session.run.log(stage=0, phase=phase, **figures)


def stage1_modules(
    session: Session, source: pathlib.Path | None = None
) -> dict[str, torch.nn.Module]:
    """Makes an encoder and the method that trains it.

    `source` is the folder of a step, whose weights both get.
    """
    settings = session.settings
    encoder = settings.new_encoder()
    n_utterances = len(session.manifest)
    method = settings.method(encoder, settings.embedding_size, n_utterances)
    if source is not None:
        load_weights(encoder.network, source / ENCODER)
        load_weights(method, source / METHOD)
    return {"encoder": encoder, "method": method}


def check_method(session: Session) -> None:
    """Makes the method once, so that unsuitable settings fail early."""
    with separate_generator("cpu"):
        method = stage1_modules(session)["method"]
    method.check_batch(session.batch_size)


def train_stage1_phase(
    session: Session,
    brain_class: Callable[..., SpeakerBrain],
    modules: dict[str, torch.nn.Module],
    folder: pathlib.Path,
    partners: Partners | None = None,
) -> None:
    """Trains a phase of Stage I, saves its weights in `folder`, scores it.

    The folder's name is `stage1` or `ssps`; the yaml has the phase's epochs.
    """

    def remark(brain):
        last = brain.tally.last  # only SSPS fills it
        return session.observer.positives(**last) if last else {}

    encoder, settings = modules["encoder"], session.settings
    course = {"stage1": settings.number_of_epochs, "ssps": settings.ssps_epochs}
    phase = modules["method"].name if folder.name == "stage1" else folder.name
    fit(
        *(session, brain_class, modules, folder),
        stage=1,
        phase=phase,
        remark=remark,
        partners=partners,
        **part_of(course, folder.name),
    )
    save_weights(encoder.network, folder / ENCODER)
    save_weights(modules["method"], folder / METHOD)
    figures = session.score(encoder, folder / SCORES, folder / BACKEND)
    session.run.log(stage=1, phase=f"after {phase}", **figures)


def check_grouping(settings: Stage1Settings, n_train: int) -> None:
    """Raises what `grouping` raises, for `n_train` utterances to train on."""
    try:
        settings.ssps_cluster.check(n_train)
    except ValueError as error:
        raise ValueError(
            f"ssps_cluster: {error}, or set ssps_epochs to 0"
        ) from error
    check_twice(settings, "ssps_")


def grouping(session: Session) -> Callable[[torch.nn.Module], tuple]:
    """Returns the function that clusters the training utterances for SSPS.

    The function takes an encoder. Raises ValueError if there are too few
    utterances for the yaml's clusters.
    """
    settings, rows = session.settings, session.train_rows
    check_grouping(settings, len(rows))
    share = settings.ssps_log_mel_share
    own_cluster = settings.ssps_source == "own"

    @functools.cache
    def statistics():
        encoder = log_mel_encoder(settings.sample_rate)
        with separate_generator(session.device):
            return session.embed(encoder, rows)

    def group(encoder):
        with separate_generator(session.device):
            embeddings = session.embed(encoder, rows)
        log_mels = None
        if share:
            log_mels = whitened_log_mels(statistics(), embeddings.utterances)

        def cluster():  # on one process: vectors may take a gigabyte
            clusters, _ = pseudo_speakers(
                np.array(embeddings.vectors),
                settings.ssps_cluster,
                backend=settings.ssps_backend,
                log_mels=log_mels,
                share=share,
                twice=settings.ssps_cluster_twice,
            )
            sources = clusters.labels
            if not own_cluster:
                nearest = nearest_centroids(clusters.centroids, session.device)
                sources = nearest[clusters.labels]
            return clusters.labels, sources

        clusters, sources = from_main(cluster)
        return clusters, sources, session.manifest.rows(embeddings.utterances)

    return group
