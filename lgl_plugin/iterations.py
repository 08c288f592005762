"""The loop as a resumable machine: what ran, what is next, where it lies.

A run folder has one sub-folder per step and a `state.json` that names the
steps that are finished. A step is recorded last, when all that it wrote is
whole, so the same command after an interruption goes on where it stopped.
"""

import csv
import functools
import json
import math
import os
import pathlib
import time

import numpy as np
import soundfile
import speechbrain as sb
import torch
import yaml
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.epoch_loop import EpochCounter
from speechbrain.utils.logger import get_logger

from lgl_plugin import analysis, verification
from lgl_plugin.brains import LossGatedBrain, SimCLRBrain
from lgl_plugin.clustering import require_faiss
from lgl_plugin.data import BadFiles, crop_dataset, held_out, load_manifest
from lgl_plugin.embeddings import (
    Embeddings,
    Extractor,
    LogMelStatistics,
    whiten,
)
from lgl_plugin.files import atomic_write, checksum, write_json
from lgl_plugin.prepare import check_folders, check_manifest, prepare_manifest
from lgl_plugin.selection import check_criterion

logger = get_logger(__name__)

ENCODER = "embedding_model.ckpt"
CLASSIFIER = "classifier.ckpt"


class Run:
    """A run folder: its finished steps and its metrics.

    Arguments
    ---------
    folder : str or pathlib.Path
        The yaml's output_folder.
    stage : int
        1 or 2; both stages share a folder.
    settings : dict
        The stage's settings, see `plain_settings`.

    Raises
    ------
    ValueError
        If the folder holds steps of this stage made with other settings:
        they would pass for results of these.

    Example
    -------
    >>> run = Run(getfixture("tmp_path"), 1, {"lr": 0.001})
    >>> run.step("stage1", lambda folder: {"epochs": 3})
    {'epochs': 3}
    >>> run = Run(run.folder, 1, {"lr": 0.001})  # the same command again
    >>> run.step("stage1", lambda folder: {"epochs": 99})
    {'epochs': 3}
    """

    def __init__(self, folder, stage, settings):
        self.folder = pathlib.Path(folder)
        self.state_file = self.folder / "state.json"
        self.done = {}
        self.settings = {}
        if self.state_file.exists():
            state = json.loads(self.state_file.read_text(encoding="utf-8"))
            self.done = state["done"]
            self.settings = state["settings"]
        before = self.settings.setdefault(f"stage {stage}", settings)
        if before != settings:
            changes = [
                f"{key}: was {before.get(key)}, is {settings.get(key)}"
                for key in {**before, **settings}
                if before.get(key) != settings.get(key)
            ]
            raise ValueError(
                f"{self.folder} holds a run of stage {stage} with other "
                "settings; set another --output_folder, or delete that one.\n"
                + "\n".join(changes)
            )

    def step(self, name, work):
        """Does a step, unless it is done.

        Arguments
        ---------
        name : str
            Also the step's sub-folder.
        work : callable
            Takes the folder, returns a dict of plain values to remember.

        Returns
        -------
        dict
            What `work` returned, now or in an earlier process.
        """
        if name in self.done:
            logger.info("%s is done, going on", name)
            return self.done[name]
        logger.info("%s begins", name)
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        result = work(folder) or {}
        self.done[name] = result
        state = {"settings": self.settings, "done": self.done}
        write_json(self.state_file, state)
        seconds = time.perf_counter() - started
        logger.info("%s is done after %.0f s", name, seconds)
        return result

    def log(self, **record):
        """Appends an object to metrics.jsonl; null is what is not finite."""
        for name, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                record[name] = None
        with open(self.folder / "metrics.jsonl", "a+b") as metrics:
            # A line torn by a crash must not swallow this one.
            if metrics.tell():
                metrics.seek(-1, os.SEEK_END)
                if metrics.read(1) != b"\n":
                    metrics.write(b"\n")
            metrics.write(json.dumps(record).encode() + b"\n")


class Training:
    """What the two stages share: a checked yaml, data, fits, verification.

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
            self.trials = verification.read_trials(
                hparams["verification_file"], hparams["trial_folder"]
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
            (folder / "state.json").unlink(missing_ok=True)
        self.run = Run(folder, hparams["stage"], plain_settings(settings))
        self.read_data()

    def read_data(self):
        """Makes or reuses the manifest and sets utterances aside."""
        hparams = self.hparams
        if hparams["manifest"]:
            manifest = pathlib.Path(hparams["manifest"])
            check_manifest(manifest)
        else:
            manifest = self.run.folder / "manifest.csv"
            prepare_manifest(
                train_folder=hparams["train_folder"],
                manifest=manifest,
                data_root=hparams["data_folder"],
                speaker_folder=hparams["speaker_folder"],
                trials=hparams["verification_file"],
                trial_folder=hparams["trial_folder"],
                max_bad_share=hparams["max_bad_share"],
            )
        self.utterances = load_manifest(manifest, hparams["data_folder"])
        self.bad_files = BadFiles(
            self.run.folder / "bad_files.txt",
            int(hparams["max_bad_share"] * len(self.utterances)),
        )
        for name in self.bad_files.reasons:
            self.utterances.pop(name, None)
        self.train, self.valid = held_out(
            self.utterances, hparams["held_out_share"], hparams["seed"]
        )
        batch = hparams["dataloader_options"]["batch_size"]
        if batch > len(self.train):
            raise ValueError(
                f"batch_size: {batch} is more than the {len(self.train)} "
                f"utterances to train on ({len(self.utterances)} in "
                f"{manifest}, less those held out). Lower batch_size."
            )

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
        epochs_before=0,
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
        labels : dict, optional
            Pseudo-labels by utterance.
        epochs_before : int
            Epochs of the phase that this one goes on from.
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
        if hparams["feature_mask"] is not None:
            modules["feature_mask"] = hparams["feature_mask"]
        counter = EpochCounter(epochs)
        recoverables = {
            name: module
            for name, module in modules.items()
            if module.state_dict()
        }
        checkpointer = Checkpointer(
            folder / "checkpoints", {**recoverables, "counter": counter}
        )
        brain = brain_class(
            modules, hparams["opt_class"], hparams, self.run_opts, checkpointer
        )
        brain.log = lambda record: self.run.log(**context, **record)
        brain.bad_files = self.bad_files
        brain.verify = self.verify
        brain.epochs_before = epochs_before
        n_crops = 2 if labels is None else 1
        crop, rate = hparams["crop_seconds"], hparams["sample_rate"]
        train = {name: self.utterances[name] for name in self.train}
        valid = {name: self.utterances[name] for name in self.valid}
        options = dict(hparams["dataloader_options"])
        brain.fit(
            counter,
            crop_dataset(train, crop, n_crops, labels, rate),
            crop_dataset(valid, crop, 2, None, rate, fixed=True),
            train_loader_kwargs={**options, "shuffle": True, "drop_last": True},
            valid_loader_kwargs=options,
        )
        checkpointer.recover_if_possible(min_key="criterion")
        return brain

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
        )

    @functools.cached_property
    def trial_utterances(self):
        """The audio that the trial list names, as `load_manifest` has it."""
        folder = pathlib.Path(self.hparams["trial_folder"])
        paths = {name: folder / name for name in self.trials.utterances}
        return {
            name: {
                "wav": str(path),
                "offset": 0.0,
                "duration": soundfile.info(str(path)).duration,
            }
            for name, path in paths.items()
        }

    def embed_trials(self, encoder):
        """Embeddings of the trial list's utterances, in its order."""
        found, bad = self.extractor(encoder)(self.trial_utterances)
        if bad:
            raise ValueError(
                f"{len(bad)} utterances of {self.hparams['verification_file']}"
                f" cannot be scored; the first: {' '.join(bad[0])}"
            )
        return found.rows(self.trials.utterances)

    def verify(self, encoder):
        """Scores the trial list: a dict of figures, empty without a list."""
        if self.trials is None:
            return {}
        return verification.verify(self.embed_trials(encoder), self.trials)


def train_stage1(hparams, run_opts, settings):
    """Stage I: SimCLR with augmentation adversarial training.

    Leaves the encoder in `<output_folder>/stage1/embedding_model.ckpt`.

    Arguments
    ---------
    hparams : dict
        `hparams/stage1.yaml`, loaded.
    run_opts : dict
        SpeechBrain's run options.
    settings : str
        The yaml's text after overrides.
    """
    training = Training(hparams, run_opts, settings)
    run = training.run

    def baselines(folder):
        """What any training must beat: the floor and the untrained encoder."""
        training.seed(0)
        if training.trials is None:
            return
        statistics = LogMelStatistics()
        reference, bad = training.extractor(statistics)(training.utterances)
        training.bad_files.add(bad)
        floor = whiten(reference.vectors, training.embed_trials(statistics))
        figures = verification.verify(floor, training.trials)
        run.log(stage=0, phase="log-mel statistics", **figures)
        figures = training.verify(hparams["new_encoder"]())
        run.log(stage=0, phase="untrained", **figures)

    def stage1(folder):
        training.seed(1)
        encoder = hparams["new_encoder"]()
        modules = {
            "embedding_model": encoder,
            "contrastive": hparams["contrastive"],
            "discriminator": hparams["discriminator"],
        }
        training.fit(
            SimCLRBrain,
            modules,
            folder,
            hparams["number_of_epochs"],
            stage=1,
            phase="simclr",
        )
        save_weights(encoder, folder / ENCODER)
        run.log(stage=1, phase="after simclr", **training.verify(encoder))

    run.step("baselines", baselines)
    run.step("stage1", stage1)


def train_stage2(hparams, run_opts, settings):
    """Stage II: extract, cluster, train, train loss-gated; again.

    Arguments
    ---------
    hparams : dict
        `hparams/stage2.yaml`, loaded.
    run_opts : dict
        SpeechBrain's run options.
    settings : str
        The yaml's text after overrides.

    Raises
    ------
    FileNotFoundError
        If there is no encoder to start from.
    ValueError
        If that encoder has another shape, or there are fewer utterances than
        clusters.
    ImportError
        If faiss is missing.
    """
    require_faiss()
    training = Training(hparams, run_opts, settings)
    debug = run_opts.get("debug", False)
    first = find_encoder(hparams, training.run.folder, debug)
    hparams["cluster"].check(len(training.utterances))
    for iteration in range(1, hparams["n_iterations"] + 1):
        run_iteration(training, iteration, first)


def run_iteration(training, iteration, first):
    """One round of Stage II.

    Arguments
    ---------
    training : Training
        The run.
    iteration : int
        From 1.
    first : pathlib.Path
        Weights of the encoder that Stage II starts from.
    """
    hparams, run = training.hparams, training.run
    name = f"iter{iteration}"
    last = iteration == hparams["n_iterations"]
    wide = last and hparams["new_last_encoder"] is not None
    previous = run.folder / f"iter{iteration - 1}" / "gated" / ENCODER
    source = first if iteration == 1 else previous
    context = {"stage": 2, "iteration": iteration}
    step = 10 * (iteration + 1)

    def extract(folder):
        # The encoder before this iteration is never the wide one.
        encoder = load_weights(hparams["new_encoder"](), source)
        found, bad = training.extractor(encoder)(training.utterances)
        training.bad_files.add(bad)
        found.save(folder)
        return {"utterances": len(found.utterances)}

    def cluster(folder):
        found = Embeddings.load(run.folder / name / "embeddings")
        started = time.perf_counter()
        clusters = hparams["cluster"](np.array(found.vectors))
        with atomic_write(folder / "centroids.npy", "wb") as out:
            np.save(out, clusters.centroids)
        write_labels(folder / "labels.csv", found.utterances, clusters.labels)
        facts = {
            "n_clusters": int(clusters.n_clusters),
            "seed": hparams["seed"],
            "encoder": checksum(source),
            "inertia": [float(value) for value in clusters.inertia],
            "points_used": int(clusters.points_used),
        }
        write_json(folder / "labels.json", facts)
        run.log(
            **context,
            phase="clusters",
            n_clusters=facts["n_clusters"],
            seconds=time.perf_counter() - started,
            **training_labels_report(training, found.utterances, clusters),
        )
        return {"n_clusters": facts["n_clusters"]}

    def train(folder, gated):
        training.seed(step + gated)
        labels = read_labels(run.folder / name / "labels" / "labels.csv")
        n_clusters = run.done[f"{name}/labels"]["n_clusters"]
        encoder = hparams["new_last_encoder" if wide else "new_encoder"]()
        classifier = hparams["new_classifier"](out_neurons=n_clusters)
        if gated:
            # The gate goes on from the same encoder and classifier.
            before = run.folder / name / "classifier"
            load_weights(encoder, before / ENCODER)
            load_weights(classifier, before / CLASSIFIER)
            gate = hparams["gate"]
            gate.start_iteration(iteration)
            # Known losses make the gate selective from its first step on.
            if (before / "losses.npy").exists():
                gate.end_epoch(np.load(before / "losses.npy"))
            epochs = hparams["gated_epochs"]
        else:
            if not wide:
                warm = hparams["encoder_init"] == "previous"
                load_weights(encoder, source if warm else first)
            if hparams["classifier_init"] == "centroids":
                centroids = np.load(run.folder / name / "labels/centroids.npy")
                with torch.no_grad():
                    classifier.weight.copy_(torch.from_numpy(centroids))
            gate = hparams["no_gate"]
            epochs = hparams["classifier_epochs"]
        phase = "gated" if gated else "classifier"
        brain = training.fit(
            LossGatedBrain,
            {
                "embedding_model": encoder,
                "classifier": classifier,
                "aam": hparams["aam"],
                "gate": gate,
            },
            folder,
            epochs,
            labels,
            hparams["classifier_epochs"] if gated else 0,
            **context,
            phase=phase,
        )
        save_weights(encoder, folder / ENCODER)
        save_weights(classifier, folder / CLASSIFIER)
        if brain.losses is not None:
            with atomic_write(folder / "losses.npy", "wb") as out:
                np.save(out, brain.losses)
        figures = training.verify(encoder)
        if gated and brain.selected is not None:
            share = float(np.mean(brain.selected))
            figures.update(selected_share=share)
            figures.update(gate_report(training, brain, labels))
        run.log(**context, phase=f"after {phase}", **figures)

    run.step(f"{name}/embeddings", extract)
    run.step(f"{name}/labels", cluster)
    run.step(f"{name}/classifier", functools.partial(train, gated=False))
    run.step(f"{name}/gated", functools.partial(train, gated=True))


def training_labels_report(training, utterances, clusters):
    """How pseudo-labels agree with true ones, if the manifest has them.

    Logged after the fact; nothing that trains reads it.
    """
    true = [training.utterances[name]["spk_id"] for name in utterances]
    if not any(true):
        return {}
    return analysis.clustering_report(np.array(true), clusters.labels)


def gate_report(training, brain, labels):
    """What the gate let through in its last epoch, against true labels."""
    names = brain.utterances
    true = [training.utterances[name]["spk_id"] for name in names]
    if not any(true):
        return {}
    pseudo = np.array([labels[name] for name in names])
    report = analysis.clustering_report(np.array(true), pseudo, brain.selected)
    return {k: v for k, v in report.items() if "gate" in k or "selected" in k}


def find_encoder(hparams, folder, debug=False):
    """The weights from which Stage II starts, checked against the yaml.

    In debug mode, which tries out a setup, an untrained encoder will do.

    Raises
    ------
    FileNotFoundError
        If there is none; says which command makes it.
    ValueError
        If they do not fit the yaml's encoder.
    """
    given = hparams["pretrained_encoder"]
    path = pathlib.Path(given) if given else folder / "stage1" / ENCODER
    if path.is_dir():
        path = path / ENCODER
    if not path.exists() and debug:
        logger.warning(
            "--debug: no encoder at %s, an untrained one it is", path
        )
        save_weights(hparams["new_encoder"](), folder / "untrained.ckpt")
        return folder / "untrained.ckpt"
    if not path.exists():
        key = f"pretrained_encoder: {given}" if given else "Stage II"
        raise FileNotFoundError(
            f"{key}: there is no encoder at {path}. Train one with "
            f"`python train_lgl.py {hparams['stage1_yaml']} "
            f"--output_folder={hparams['output_folder']} "
            f"--data_folder={hparams['data_folder']}`, or set "
            "pretrained_encoder to a SpeechBrain ECAPA-TDNN checkpoint."
        )
    load_weights(hparams["new_encoder"](), path)
    return path


def plain_settings(text):
    """What a yaml says, as plain data: its tags too, but no comments.

    Arguments
    ---------
    text : str
        A HyperPyYAML text with its references resolved.

    Returns
    -------
    dict
        All but output_folder: a run that was moved is the same run.

    Example
    -------
    >>> plain_settings("gate: !new:lgl_plugin.gates.FixedGate {tau: 1}")
    {'gate': {'!new:lgl_plugin.gates.FixedGate': {'tau': 1}}}
    """

    class Loader(yaml.SafeLoader):
        """Reads a tagged node as {tag: value}."""

    def construct(loader, tag, node):
        if isinstance(node, yaml.MappingNode):
            return {"!" + tag: loader.construct_mapping(node, deep=True)}
        if isinstance(node, yaml.SequenceNode):
            return {"!" + tag: loader.construct_sequence(node, deep=True)}
        return {"!" + tag: loader.construct_scalar(node)}

    Loader.add_multi_constructor("!", construct)
    settings = yaml.load(text, Loader) or {}
    settings.pop("output_folder", None)
    return settings


def check_device(device):
    """The device to use, or a ValueError if it is not there.

    Example
    -------
    >>> check_device("cpu")
    'cpu'
    """
    if device is None:
        return sb.utils.distributed.infer_device()
    if "cuda" in device and not torch.cuda.is_available():
        raise ValueError(
            f"--device={device}: torch {torch.__version__} finds no GPU here. "
            "Check `nvidia-smi` and that torch was installed with CUDA, or "
            "use --device=cpu."
        )
    return device


def save_weights(module, path):
    """Writes a module's plain state dict, atomically."""
    with atomic_write(path, "wb") as out:
        torch.save(module.state_dict(), out)


def load_weights(module, path):
    """Loads a plain state dict, strictly.

    Returns
    -------
    torch.nn.Module
        The same module.

    Raises
    ------
    ValueError
        If the file does not fit the module; names the first difference.

    Example
    -------
    >>> path = getfixture("tmp_path") / "embedding_model.ckpt"
    >>> save_weights(torch.nn.Linear(2, 3), path)
    >>> load_weights(torch.nn.Linear(2, 3), path)
    Linear(in_features=2, out_features=3, bias=True)
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        module.load_state_dict(weights)
    except Exception as error:
        first = str(error).strip().splitlines()[:2]
        raise ValueError(
            f"{path} does not fit the {type(module).__name__} of the yaml "
            f"(another width, or not an encoder): {' '.join(first)}"
        ) from error
    return module


def write_labels(path, utterances, labels):
    """Writes pseudo-labels as a csv of ID and label, atomically."""
    with atomic_write(path) as out:
        writer = csv.writer(out)
        writer.writerow(["ID", "label"])
        writer.writerows(zip(utterances, labels.tolist()))


def read_labels(path):
    """Reads what `write_labels` wrote.

    Returns
    -------
    dict
        From utterance ID to int.

    Example
    -------
    >>> path = getfixture("tmp_path") / "labels.csv"
    >>> write_labels(path, ["a.wav", "b.wav"], np.array([4, 0]))
    >>> read_labels(path)
    {'a.wav': 4, 'b.wav': 0}
    """
    with open(path, newline="", encoding="utf-8") as source:
        rows = csv.reader(source)
        next(rows)
        return {name: int(label) for name, label in rows}
