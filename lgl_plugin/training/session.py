"""What both stages do alike: check the yaml, read data, fit, verify."""

import functools
import math
import os
import pathlib

import numpy as np
import speechbrain as sb
import torch
from speechbrain.utils.distributed import main_process_only
from speechbrain.utils.epoch_loop import EpochCounter
from speechbrain.utils.logger import get_logger

from lgl_plugin.dataio import trials
from lgl_plugin.dataio.bad_files import BadFiles
from lgl_plugin.dataio.dataset import crop_dataset
from lgl_plugin.dataio.manifest import held_out, load_manifest
from lgl_plugin.dataio.prepare import check_folders, prepare_manifest
from lgl_plugin.dataio.sampler import ShardSampler, shard_numbers
from lgl_plugin.dataio.trials import trial_audio
from lgl_plugin.evaluation import verification
from lgl_plugin.inference.extractor import Extractor
from lgl_plugin.nnet.encoders import LogMelStatistics
from lgl_plugin.runs.checkpoints import WholeCheckpointer
from lgl_plugin.runs.lock import lock_folder
from lgl_plugin.runs.metrics_log import read_metrics, record_key
from lgl_plugin.runs.provenance import record_start
from lgl_plugin.runs.run import Run
from lgl_plugin.runs.settings import plain_settings
from lgl_plugin.training.epoch_selection import (
    SAMPLE,
    ClusterFigures,
    check_criterion,
)
from lgl_plugin.training.health import findings
from lgl_plugin.utils.device import check_device, keep_freed_memory
from lgl_plugin.utils.distributed import from_main, world_size
from lgl_plugin.utils.files import save_arrays
from lgl_plugin.utils.signals import own_process_group

logger = get_logger(__name__)


class Training:
    """A checked yaml with its data, ready to fit and to verify.

    Arguments
    ---------
    hparams : dict
        The loaded yaml.
    run_opts : dict
        SpeechBrain's run options.
    settings : str
        The yaml's text after overrides, kept to tell runs apart.

    Raises
    ------
    ValueError, FileNotFoundError
        Where the yaml, the trial list or the device cannot work; before any
        training.
    """

    def __init__(self, hparams, run_opts, settings):
        self.hparams = hparams
        self.run_opts = run_opts
        self.device = check_device(run_opts.get("device"))
        if self.device == "cpu":
            keep_freed_memory()
        given = getattr(run_opts, "overridden_args", run_opts)
        chosen = run_opts if "eval_precision" in given else hparams
        self.eval_precision = chosen.get("eval_precision", "fp32")
        check_criterion(hparams["selection"])
        if not 0 <= hparams["seed"] < 2**22:
            raise ValueError(
                f"seed: {hparams['seed']} must be from 0 to {2**22 - 1}; each "
                "step seeds 1,000 times that, and seeds have 32 bits."
            )
        if not hparams["manifest"]:
            # Before the trial list, whose default lies in the same folder.
            check_folders(
                os.path.abspath(hparams["train_folder"]),
                os.path.abspath(hparams["data_folder"]),
            )
        self.trials = None
        if hparams["verification_file"]:
            self.trials = trials.read_trials(
                hparams["verification_file"],
                hparams["trial_folder"],
                hparams["allow_outside_data_folder"],
            )
        elif hparams["selection"] == "trials":
            raise ValueError(
                "selection: trials needs a trial list; set verification_file, "
                "or choose selection: pseudo_trials, which needs none."
            )
        folder = pathlib.Path(hparams["output_folder"])
        if run_opts.get("debug"):
            # Two batches are no result: they neither count as done nor mix
            # with a real run.
            folder = folder / "debug"
            from_main(lock_folder, folder)
            for name in ("state.json", "metrics.jsonl"):
                (folder / name).unlink(missing_ok=True)
        self.run = Run(folder, hparams["stage"], plain_settings(settings))
        record_start(folder, hparams["stage"], self.device)
        if hparams["verification_file"]:
            self.run.given("verification_file", hparams["verification_file"])
        self.read_data()

    def read_data(self):
        """Makes or reuses the manifest and sets utterances aside."""
        hparams = self.hparams
        if hparams["manifest"]:
            manifest = pathlib.Path(hparams["manifest"])
        else:
            manifest = self.run.folder / "manifest.csv"
            sb.utils.distributed.run_on_main(
                prepare_manifest,
                kwargs=dict(
                    train_folder=hparams["train_folder"],
                    manifest=manifest,
                    data_root=hparams["data_folder"],
                    speaker_folder=hparams["speaker_folder"],
                    trials=hparams["verification_file"],
                    trial_folder=hparams["trial_folder"],
                    max_bad_share=hparams["max_bad_share"],
                ),
            )
        self.run.given("manifest", manifest)
        self.manifest = load_manifest(
            manifest,
            hparams["data_folder"],
            hparams["allow_outside_data_folder"],
        )
        self.bad_files = BadFiles(self.run.folder / "bad_files.txt")
        bad = self.bad_files.reasons
        # The share is of all files, those too that are in no manifest.
        n_files = len(bad) + sum(name not in bad for name in self.manifest.ids)
        self.bad_files.limit = int(hparams["max_bad_share"] * n_files)
        self.bad_files.check()  # starting again must not lift the limit
        # What is known to be bad stays in: left out after a restart, it would
        # change the order of all others, and the run.
        self.rows = np.arange(len(self.manifest))
        self.train, self.valid = held_out(
            len(self.rows), hparams["held_out_share"], hparams["seed"]
        )
        # Over all processes, each of which reads so many.
        batch = hparams["dataloader_options"]["batch_size"] * world_size()
        self.batch_size = batch
        if batch > len(self.train):
            raise ValueError(
                f"batch_size: {batch} is more than the {len(self.train)} "
                f"utterances to train on ({len(self.rows)} in "
                f"{manifest}, less those held out). Lower batch_size."
            )

    @main_process_only
    def log(self, **record):
        """Adds a record to the run's metrics, and warns of what it shows."""
        self.run.log(**record)
        try:
            found = findings(read_metrics(self.run.folder))
        except Exception as error:  # of a file that was altered
            logger.warning("The run's health cannot be judged: %s", error)
            return
        for where, words in found:
            if record_key(where) == record_key(record):
                logger.warning(words)

    def seed(self, step):
        """Seeds all generators for a step, apart from every other step.

        SpeechBrain shuffles by seed and epoch: with one seed, epoch 1 of
        every phase would have the same order.
        """
        sb.utils.seed.seed_everything(self.hparams["seed"] * 1000 + step)

    def fit(
        self,
        brain_class,
        modules,
        folder,
        epochs,
        labels=None,
        rows=None,
        crop_seconds=None,
        epochs_before=0,
        remark=None,
        **context,
    ):
        """Trains modules and leaves those of the chosen epoch in them.

        Arguments
        ---------
        brain_class : type
            SimCLRBrain or LossGatedBrain.
        modules : dict
            Its modules, apart from features and augmentation.
        folder : pathlib.Path
            For checkpoints.
        epochs : int
            How many.
        labels : numpy.ndarray, optional
            Pseudo-labels by row of the manifest, int64, -1 where there is
            none.
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
        Brain
            After the fit.
        """
        hparams = self.hparams
        shared = ("compute_features", "mean_var_norm", "augment")
        modules = {**{name: hparams[name] for name in shared}, **modules}
        counter = EpochCounter(epochs)
        recoverables = {
            name: module
            for name, module in modules.items()
            if module.state_dict()
        }
        checkpointer = WholeCheckpointer(
            folder / "checkpoints", {**recoverables, "counter": counter}
        )
        brain = brain_class(
            modules, hparams["opt_class"], hparams, self.run_opts, checkpointer
        )

        def log(record):
            if remark is not None:
                record = {**record, **remark(brain)}
            self.log(**context, **record)
            self.show(folder.relative_to(self.run.folder), record)

        brain.log = log
        brain.bad_files = self.bad_files
        figures = ClusterFigures(self.device)
        checkpointer.add_recoverable("clusters", figures)
        brain.examine = self.examiner(figures)
        brain.epochs_before = epochs_before
        n_crops = 2 if labels is None else 1
        crop = crop_seconds or hparams["crop_seconds"]
        rate = hparams["sample_rate"]
        rows = self.train if rows is None else rows
        data = self.manifest
        # From pinned memory the GPU fetches a batch while it still computes.
        pinned = {"pin_memory": torch.device(self.device).type == "cuda"}
        options = {**pinned, "worker_init_fn": own_process_group}
        options.update(hparams["dataloader_options"])
        seed = int(os.environ["SB_GLOBAL_SEED"])  # of SpeechBrain's samplers
        train = crop_dataset(data, rows, crop, n_crops, labels, rate, seed)
        if len(train) < self.batch_size:  # the last, smaller batch is left out
            raise ValueError(
                f"{context['phase']}: {len(train)} utterances make no batch of "
                f"{self.batch_size}, so nothing would be trained. Lower "
                "batch_size."
            )
        brain.seed, brain.train_data = seed, train
        order = {"shuffle": True}
        if data.places is not None:
            shards = shard_numbers(data.wavs)[train.data_ids]
            brain.train_sampler = ShardSampler(shards, seed=seed)
            order = {"sampler": brain.train_sampler}
        brain.fit(
            counter,
            train,
            # The same crops at every epoch of every phase.
            crop_dataset(data, self.valid, crop, 2, None, rate),
            train_loader_kwargs={**options, **order, "drop_last": True},
            valid_loader_kwargs=options,
        )
        checkpointer.recover_if_possible(min_key="criterion")
        return brain

    def show(self, phase, record):
        """Hands an epoch's figures to the yaml's train_logger."""
        logger = self.hparams["train_logger"]
        if logger is None:
            return
        stats = {
            f"{phase.as_posix()}/{name}": value
            for name, value in record.items()
            if value is not None and name != "epoch"
        }
        logger.log_stats({"epoch": record["epoch"]}, train_stats=stats)

    def examiner(self, figures):
        """What is to be known of each epoch's encoder, as `selection` asks.

        Arguments
        ---------
        figures : lgl_plugin.training.epoch_selection.ClusterFigures
            Those of the phase.

        Returns
        -------
        callable
            From an encoder to a dict of plain numbers.
        """
        chosen = self.hparams["selection"]
        study = self.hparams["selection_study"]
        clusters = study or chosen in ("silhouette", "agreement")
        trials = study or chosen == "trials"
        # The same at every phase, whatever was drawn before.
        rng = np.random.default_rng(self.hparams["seed"])
        rows = rng.permutation(self.rows)[:SAMPLE]

        def examine(encoder):
            found = {}
            if clusters:
                some, bad = self.extractor(encoder)(self.manifest, rows)
                self.bad_files.add(bad)
                found.update(figures(np.array(some.vectors)))
            if trials:
                found.update(self.verify(encoder))
            return found

        return examine

    def extractor(self, encoder):
        """An Extractor with the yaml's features around an encoder."""
        normalise = self.hparams["mean_var_norm"]
        if isinstance(encoder, LogMelStatistics):
            normalise = None  # it would take away the mean
        return Extractor(
            self.hparams["compute_features"],
            normalise,
            encoder,
            self.device,
            self.hparams["sample_rate"],
            num_workers=self.hparams["dataloader_options"]["num_workers"],
            precision=self.eval_precision,
            # 0 is SpeechBrain's word for never.
            keep_seconds=60 * self.hparams["ckpt_interval_minutes"] or math.inf,
        )

    @functools.cached_property
    def trial_audio(self):
        """The audio that the trial list names, as a Manifest, in its order."""
        return trial_audio(self.trials, self.hparams["trial_folder"])

    def embed_trials(self, encoder):
        """Embeddings of the trial list's utterances, in its order."""
        audio = self.trial_audio
        found, bad = self.extractor(encoder)(audio, np.arange(len(audio)))
        if bad:
            raise ValueError(
                f"{len(bad)} utterances of {self.hparams['verification_file']}"
                f" cannot be scored; the first: {' '.join(bad[0])}"
            )
        return found.vectors

    def verify(self, encoder, path=None):
        """Scores the trial list: a dict of figures, empty without a list.

        Arguments
        ---------
        encoder : torch.nn.Module
            What to score.
        path : pathlib.Path, optional
            Where the scores (T,) and labels (T,) are kept, as an npz file.
        """
        if self.trials is None:
            return {}
        return self.score(self.embed_trials(encoder), path)

    def score(self, embeddings, path=None):
        """`verify` for the trial list's embeddings."""
        if path is not None:
            scores = verification.cosine_scores(embeddings, self.trials)
            save_arrays(path, scores=scores, labels=self.trials.labels)
        return verification.verify(embeddings, self.trials)
