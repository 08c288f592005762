"""A checked setup: settings, device, run folder and data, ready to train."""

import copy
import dataclasses
import logging
import math
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import speechbrain as sb
import torch
from speechbrain.utils.distributed import main_process_only
from speechbrain.utils.logger import get_logger

from lgl_plugin.dataio.folder import names_and_sizes, refuse_recordings
from lgl_plugin.dataio.manifest import Manifest
from lgl_plugin.dataio.prepare import check_folders
from lgl_plugin.inference.backends import Backend, Whitening
from lgl_plugin.inference.export import export
from lgl_plugin.inference.extractor import Extractor
from lgl_plugin.inference.inference_model import NotExportable
from lgl_plugin.inference.store import Embeddings
from lgl_plugin.runs.lock import lock_folder
from lgl_plugin.runs.metrics_log import METRICS, read_metrics, record_key
from lgl_plugin.runs.plain import plain_settings
from lgl_plugin.runs.pretrained import YAML
from lgl_plugin.runs.provenance import record_start
from lgl_plugin.runs.run import Run
from lgl_plugin.runs.schema import Settings
from lgl_plugin.runs.settings import SETTINGS_TOO, without_helpers
from lgl_plugin.runs.state import STATE
from lgl_plugin.training.data import check_loaders, read_data, try_manifest
from lgl_plugin.training.health import findings
from lgl_plugin.training.sizes import (
    split_rows,
    steps_per_epoch,
    warn_of_short,
    whole_batch,
)
from lgl_plugin.utils.device import check_device, keep_freed_memory
from lgl_plugin.utils.distributed import from_main, world_size
from lgl_plugin.utils.files import atomic_write, explain_full_disk
from lgl_plugin.utils.signals import stop

logger = get_logger(__name__)

# Utterances that a back-end is fitted on, and AS-norm's cohort: ten for each
# of 192 dimensions, embedded in seconds on a GPU and in half a minute on a
# core, where all of VoxCeleb2 after each phase would take hours.
SAMPLE = 2000


def sample_rows(n_utterances: int, seed: int) -> np.ndarray:
    """Draws up to `SAMPLE` rows of a manifest, in order, by the run's seed."""
    if n_utterances <= SAMPLE:
        return np.arange(n_utterances)
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(n_utterances, SAMPLE, replace=False))


def check_folder(settings: Settings) -> None:
    """Refuses to begin a run among recordings, or in a folder of `lgl embed`.

    To be called before the run's lock lies in there: by a lock `lgl embed`
    knows a folder of its own, whose manifest the run would replace.
    """
    folder = pathlib.Path(settings.output_folder)
    if not (folder / STATE).exists():
        # The audio of a user's own list may be anywhere.
        audio = None if settings.manifest else settings.train_folder
        refuse_recordings(folder, audio)
    if (folder / "vectors.npy").exists():
        raise FileExistsError(
            f"{folder} holds embeddings of `lgl embed`, and their list of "
            "recordings would be replaced: name another folder"
        )


class Session:
    """A stage's checked settings with its data and its run folder.

    Arguments
    ---------
    settings : lgl_plugin.runs.schema.Settings
        From `load_settings`.
    text : str
        The yaml's text after overrides, from `load_settings`.
    run_opts : dict
        SpeechBrain's run options.
    observer_of : callable
        Takes the settings, before anything is written, and returns a callable
        that takes the manifest and returns an observer with the methods of
        `lgl_plugin.evaluation.observer.TrueLabels`: what is logged of true
        labels after the fact comes from it alone.

    Attributes
    ---------
    run : lgl_plugin.runs.run.Run
        The run folder.
    manifest : lgl_plugin.dataio.manifest.Manifest
        All utterances, their speakers unknown.
    given : lgl_plugin.dataio.given.GivenLabels or None
        The labels that the yaml's `labels_file` gives. These are of the user,
        who asks for them to be trained on; the observer's true labels are not
        among them.
    rows, train_rows, held_out_rows : numpy.ndarray
        Rows of the manifest, int64: all, those to train on, those set aside.

    Raises
    ------
    ValueError, FileNotFoundError, FileExistsError
        Where the settings, the data, the folder or the device cannot work;
        before any training.
    """

    def __init__(
        self,
        settings: Settings,
        text: str,
        run_opts: dict,
        observer_of: Callable[[Settings], Callable[[Manifest], Any]],
    ):
        self.settings = settings
        self.step_seed = settings.seed  # the yaml's, until a step begins
        self.debug = bool(run_opts.get("debug"))
        self.device = check_device(run_opts.get("device"))
        # SpeechBrain's Brain looks for run options in here, too, where a None
        # would hide the option's default.
        self.brain_settings = {
            name: value
            for name, value in dict(settings).items()
            if value is not None or name not in SETTINGS_TOO
        }
        self.run_opts = _with_device(run_opts, self.device)
        if self.device == "cpu":
            keep_freed_memory()
        if not settings.manifest:
            check_folders(
                os.path.abspath(settings.train_folder),
                os.path.abspath(settings.data_folder),
            )
        elif not os.path.isfile(settings.manifest):
            raise FileNotFoundError(
                f"manifest: {settings.manifest} is no file. Set --manifest to "
                "the csv of your utterances, or to null for all of "
                "train_folder."
            )
        # Folders are checked first: a wrong data_folder would otherwise be
        # reported as a missing trial list.
        observe = observer_of(settings)
        check_folder(settings)
        folder = pathlib.Path(settings.output_folder)
        if self.debug:
            # Two batches are no result: they neither count as done nor mix
            # with a real run.
            folder = folder / "debug"
            stop.keeps = False
            from_main(_forget, folder)
            # By default each rank would get a temporary checkpoint folder of
            # its own, and the ranks would wait for each other for ever.
            self.brain_settings["debug_persistently"] = True
        self.run = Run(folder, settings.stage, plain_settings(text))
        self._begin_log(text)
        record_start(folder, settings.stage, self.device)
        if settings.verification_file:
            self.run.record_input(
                "verification_file", settings.verification_file
            )
        for name in ("musan_folder", "rir_folder"):
            if folder := getattr(settings, name):
                self.run.record_input(name, folder, names_and_sizes)
        self.manifest, self.given, self.bad_files = read_data(
            settings, self.run
        )
        self._set_aside()
        if settings.manifest and not self.debug:
            from_main(try_manifest, settings, self.manifest, self.bad_files)
        check_loaders(settings, self.device)
        warn_of_short(settings, self.manifest)
        if self.run.done:  # its exports read data that have moved
            self.run.save()
        self.observer = observe(self.manifest)
        # The observer alone knows true speakers: no training, and no choice
        # of one, can read them here.
        self.manifest = self.manifest.without_speakers()

    def _begin_log(self, text):
        """Begins the stage's log, and keeps the yaml as it is used."""
        folder = self.run.folder / f"stage{self.settings.stage}"
        with explain_full_disk(folder):  # log.txt is begun in there
            sb.create_experiment_directory(folder)
        # Each epoch's line has the learning rate: a line for each optimiser
        # would come on top.
        logging.getLogger("speechbrain.nnet.schedulers").setLevel("WARNING")
        if sb.utils.distributed.if_main_process():
            with atomic_write(folder / YAML) as out:
                out.write(without_helpers(text))

    def _set_aside(self):
        """Sets utterances aside; the others must fill a batch."""
        settings = self.settings
        # Known bad files stay in: left out after a restart, they would change
        # the order of all others, and the run.
        self.rows = np.arange(len(self.manifest))
        self.train_rows, self.held_out_rows = split_rows(
            settings,
            len(self.rows),
            () if self.given is None else self.given.rows,
        )
        self.batch_size = whole_batch(settings)

    @main_process_only
    def log(self, **record: Any) -> None:
        """Adds a record to the run's metrics, and warns of what it shows."""
        self.run.log(**record)
        if self.debug:  # a few batches tell nothing of a run's health
            return
        try:
            warnings = findings(read_metrics(self.run.folder))
        except Exception as error:  # the file was altered by someone
            logger.warning("The run's health cannot be judged: %s", error)
            return
        # Only the new record's warnings: each is logged once.
        for shown_by, warning in warnings:
            if record_key(shown_by) == record_key(record):
                logger.warning(warning)

    def show(self, phase: str, record: dict) -> None:
        """Hands an epoch's figures to the yaml's train_logger, if any."""
        train_logger = self.settings.train_logger
        if train_logger is None:
            return
        # Its module says on import, to everybody, that torchvision is missing.
        from speechbrain.utils.train_logger import TensorboardLogger

        stats = {
            f"{phase}/{name}": value
            for name, value in record.items()
            if value is not None and name != "epoch"
        }
        if isinstance(train_logger, TensorboardLogger):
            # The logger counts calls from 0 at each start: the curves of a
            # resumed run would begin anew.
            before = record["epoch"] - 1
            steps = {"meta": before, "train": dict.fromkeys(stats, before)}
            train_logger.global_step.update(steps)
        # Under the name "epoch", which begins anew in each phase, W&B would
        # drop all phases but the first: its steps may only rise.
        train_logger.log_stats(
            {f"{phase}/epoch": record["epoch"]}, train_stats=stats
        )

    def seed(self, step: int) -> None:
        """Seeds all generators for a step, apart from every other step.

        SpeechBrain shuffles by seed and epoch: with one seed, epoch 1 of
        every phase would have the same order.
        """
        seed = self.settings.seed * 1000 + step
        self.step_seed = sb.utils.seed.seed_everything(seed)

    def steps_per_epoch(self, n_utterances: int) -> int:
        """Returns the steps of an epoch on so many utterances."""
        return steps_per_epoch(self.settings, self.batch_size, n_utterances)

    def extractor(self, encoder: torch.nn.Module) -> Extractor:
        """Makes the extractor of whole utterances for an encoder."""
        settings = self.settings
        return Extractor(
            encoder,
            self.device,
            settings.sample_rate,
            num_workers=settings.dataloader_options.num_workers,
            precision=settings.eval_precision,
            # 0 is SpeechBrain's word for never.
            keep_seconds=60 * settings.ckpt_interval_minutes or math.inf,
        )

    def embed(
        self,
        encoder: torch.nn.Module,
        rows: np.ndarray | None = None,
        folder: pathlib.Path | None = None,
    ) -> Embeddings:
        """Embeds utterances of the manifest; bad ones are counted.

        Returns Embeddings of `rows`, of all if these are not given, kept in
        `folder` if that is.
        """
        rows = self.rows if rows is None else rows
        embeddings, bad = self.extractor(encoder)(
            self.manifest, rows, folder, self.bad_files
        )
        self.bad_files.add(bad)  # those of other processes, too
        return embeddings

    def score(
        self,
        encoder: torch.nn.Module,
        path: pathlib.Path | None = None,
        backend_path: pathlib.Path | None = None,
        whitening: Whitening | None = None,
    ) -> dict:
        """Returns the observer's error rates of an encoder; {} without trials.

        Without a `path`, which keeps the scores, only the cosine is scored.
        With a `path`, as at a phase's end, the yaml's `backend` is fitted on a
        sample of the training utterances and scored too. Without a `backend`,
        whitening is, so that every run shows its effect. `backend_path` keeps
        the back-end for `lgl export`. A `whitening` is fitted and applied to
        all embeddings first.
        """
        backend = sample = None
        if path is not None:
            if backend_path is None and not self.settings.verification_file:
                return {}  # nothing would come of the sample
            rows = sample_rows(len(self.rows), self.settings.seed)
            sample = self.embed(encoder, rows).vectors
            if whitening is not None:
                sample = whitening.fit_transform(sample)
            backend = self._fit_backend(sample)
            if backend is not None and backend_path is not None:
                backend.save(backend_path)

        def embed(audio):
            vectors = self.extractor(encoder).embed_all(audio)
            return vectors if whitening is None else whitening(vectors)

        return self.observer.score_trials(embed, path, backend, sample)

    def _fit_backend(self, sample: np.ndarray) -> Backend | None:
        """Fits the run's back-end on embeddings; None if that fails."""
        # A copy: each phase has its own, and one that is kept must not change.
        backend = copy.deepcopy(self.settings.backend) or Whitening()
        try:
            return backend.fit(sample)
        except ValueError as error:  # the end of a phase must not be lost
            logger.warning("No back-end for this phase: %s", error)
            return None

    def publish(self, name: str, made_from: str | None) -> None:
        """Exports a stage's or round's encoder, as the step `export/<name>`.

        A failure does not end a training that went well; the next start tries
        the export again. With several processes only one that all share: the
        others would wait for a process that failed alone.
        """
        run = self.run

        def export_latest(folder):
            try:
                return export(run.folder, name, folder, device=self.device)
            except NotExportable as error:
                # `lgl export` would fail as well.
                logger.warning("No export of %s: %s", name, error)
                return {"failed": str(error)}
            except Exception as error:
                alike = ValueError, FileExistsError, FileNotFoundError
                of_all = getattr(error, "on_all_ranks", world_size() == 1)
                if not (of_all or isinstance(error, alike)):
                    raise
                logger.warning(
                    "No export; try `lgl export %s %s`",
                    run.folder,
                    name,
                    exc_info=True,
                )
                return {"failed": f"{type(error).__name__}: {error}"}

        run.step(f"export/{name}", export_latest, made_from)


def _with_device(run_opts, device):
    """Returns run options with a device, as if the command line named it."""
    given = {*run_opts.overridden_args, "device"}
    return dataclasses.replace(run_opts, device=device, overridden_args=given)


def _forget(folder):
    """Makes a debug run's folder as if it had never been used."""
    lock_folder(folder)
    for name in (STATE, METRICS):
        (folder / name).unlink(missing_ok=True)
    for checkpoints in folder.glob("**/checkpoints"):
        shutil.rmtree(checkpoints)
