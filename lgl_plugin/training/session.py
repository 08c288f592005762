"""A session: checked settings, device, run folder and data, ready to train."""

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

# Utterances on which a back-end is fitted, and which are AS-norm's cohort: ten
# for each of 192 dimensions. Embedding them takes seconds on a GPU and half a
# minute on a core. All of VoxCeleb2 after each phase would take hours.
SAMPLE = 2000


def sample_rows(n_utterances: int, seed: int) -> np.ndarray:
    """Draws up to `SAMPLE` rows of a manifest, in order, by the run's seed."""
    if n_utterances <= SAMPLE:
        return np.arange(n_utterances)
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(n_utterances, SAMPLE, replace=False))


def check_folder(settings: Settings) -> None:
    """Refuses a run folder among recordings, or one with embeddings.

    Call the function before the run's lock is written: `lgl embed` recognises
    its own folder by a lock, and the run would replace that folder's manifest.
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
        Takes the settings, before anything is written. Returns a callable that
        takes the manifest and returns an observer with the methods of
        `lgl_plugin.evaluation.observer.TrueLabels`. Only the observer gives
        figures of true labels, which are logged.

    Attributes
    ---------
    run : lgl_plugin.runs.run.Run
        The run folder.
    manifest : lgl_plugin.dataio.manifest.Manifest
        All utterances, without their speakers.
    given : lgl_plugin.dataio.given.GivenLabels or None
        The labels of the yaml's `labels_file`. A user gives them for training;
        the observer's true labels are not among them.
    rows, train_rows, held_out_rows : numpy.ndarray
        Rows of the manifest, int64: all, those to train on, those held out.

    Raises
    ------
    ValueError, FileNotFoundError, FileExistsError
        If settings, data, folder or device are unusable, before any training.
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
        # SpeechBrain's Brain also looks for run options here, where None would
        # hide an option's default.
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
        # Folders are checked first: otherwise a wrong data_folder is reported
        # as a missing trial list.
        observe = observer_of(settings)
        check_folder(settings)
        folder = pathlib.Path(settings.output_folder)
        if self.debug:
            # Two batches are no result: they must neither count as done nor mix
            # with a real run.
            folder = folder / "debug"
            stop.keeps = False
            from_main(_forget, folder)
            # By default each rank gets its own temporary checkpoint folder, and
            # the ranks would wait for each other forever.
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
        if self.run.done:  # exports read the current paths of the data
            self.run.save()
        self.observer = observe(self.manifest)
        # Only the observer has true speakers: neither training nor any choice
        # of training can read them.
        self.manifest = self.manifest.without_speakers()

    def _begin_log(self, text):
        """Begins the stage's log, and keeps the yaml as used."""
        folder = self.run.folder / f"stage{self.settings.stage}"
        with explain_full_disk(folder):  # log.txt is begun in there
            sb.create_experiment_directory(folder)
        # Each epoch's line already has the learning rate; SpeechBrain would add
        # a line for each optimiser.
        logging.getLogger("speechbrain.nnet.schedulers").setLevel("WARNING")
        if sb.utils.distributed.if_main_process():
            with atomic_write(folder / YAML) as out:
                out.write(without_helpers(text))

    def _set_aside(self):
        """Holds utterances out; the others must fill a batch."""
        settings = self.settings
        # Known bad files stay in. Without them a restarted run would have
        # another order of all other files.
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
        if self.debug:  # a few batches say nothing about a run's health
            return
        try:
            warnings = findings(read_metrics(self.run.folder))
        except Exception as error:  # someone may have altered the file
            logger.warning("The run's health cannot be judged: %s", error)
            return
        # Only warnings of the new record, so that each is logged once.
        for shown_by, warning in warnings:
            if record_key(shown_by) == record_key(record):
                logger.warning(warning)

    def show(self, phase: str, record: dict) -> None:
        """Passes an epoch's figures to the yaml's train_logger, if any."""
        train_logger = self.settings.train_logger
        if train_logger is None:
            return
        # Imported only here, because the module warns on import if torchvision
        # is missing.
        from speechbrain.utils.train_logger import TensorboardLogger

        stats = {
            f"{phase}/{name}": value
            for name, value in record.items()
            if value is not None and name != "epoch"
        }
        if isinstance(train_logger, TensorboardLogger):
            # The logger counts calls from 0 at each start, so the curves of a
            # resumed run would begin again at 0.
            before = record["epoch"] - 1
            steps = {"meta": before, "train": dict.fromkeys(stats, before)}
            train_logger.global_step.update(steps)
        # The name has the phase, because W&B's steps may only rise: as "epoch",
        # which begins at 1 in each phase, W&B would drop all phases but the
        # first.
        train_logger.log_stats(
            {f"{phase}/epoch": record["epoch"]}, train_stats=stats
        )

    def seed(self, step: int) -> None:
        """Seeds all generators for a step, unlike every other step.

        SpeechBrain shuffles by seed and epoch: with one seed, epoch 1 of every
        phase would have the same order.
        """
        seed = self.settings.seed * 1000 + step
        self.step_seed = sb.utils.seed.seed_everything(seed)

    def steps_per_epoch(self, n_utterances: int) -> int:
        """Returns the number of steps of an epoch on `n_utterances`."""
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
            # 0 means never in SpeechBrain.
            keep_seconds=60 * settings.ckpt_interval_minutes or math.inf,
        )

    def embed(
        self,
        encoder: torch.nn.Module,
        rows: np.ndarray | None = None,
        folder: pathlib.Path | None = None,
    ) -> Embeddings:
        """Embeds utterances of the manifest, by default all; counts bad ones.

        Returns Embeddings of `rows`, which `folder` keeps, if given.
        """
        rows = self.rows if rows is None else rows
        embeddings, bad = self.extractor(encoder)(
            self.manifest, rows, folder, self.bad_files
        )
        self.bad_files.add(bad)  # those of all processes
        return embeddings

    def score(
        self,
        encoder: torch.nn.Module,
        path: pathlib.Path | None = None,
        backend_path: pathlib.Path | None = None,
        whitening: Whitening | None = None,
    ) -> dict:
        """Returns the observer's error rates of an encoder; {} without trials.

        Without a `path`, only the cosine is scored. With a `path`, which keeps
        the scores at a phase's end, the yaml's `backend` is fitted on a sample
        of the training utterances and scored too. If the yaml has no `backend`,
        whitening is, so that every run shows its effect. `backend_path` keeps
        the back-end for `lgl export`. A `whitening` is fitted, and applied to
        all embeddings, first.
        """
        backend = sample = None
        if path is not None:
            if backend_path is None and not self.settings.verification_file:
                return {}  # the sample would not be used
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
        # A copy, because each phase has its own back-end, and an earlier one
        # must not change.
        backend = copy.deepcopy(self.settings.backend) or Whitening()
        try:
            return backend.fit(sample)
        except ValueError as error:  # must not end a trained phase
            logger.warning("No back-end for this phase: %s", error)
            return None

    def publish(self, name: str, made_from: str | None) -> None:
        """Exports a stage's or round's encoder, as the step `export/<name>`.

        A failed export does not end a training that succeeded; the next start
        tries again. With several processes this holds only for failures of all
        processes: if one process fails alone, the others would wait for it.
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
                raised_by_all = ValueError, FileExistsError, FileNotFoundError
                on_all_ranks = getattr(error, "on_all_ranks", world_size() == 1)
                if not (on_all_ranks or isinstance(error, raised_by_all)):
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
    """Returns run options with a device, as if the command line had set it."""
    given = {*run_opts.overridden_args, "device"}
    return dataclasses.replace(run_opts, device=device, overridden_args=given)


def _forget(folder):
    """Resets a debug run's folder, so that nothing counts as done."""
    lock_folder(folder)
    for name in (STATE, METRICS):
        (folder / name).unlink(missing_ok=True)
    for checkpoints in folder.glob("**/checkpoints"):
        shutil.rmtree(checkpoints)
