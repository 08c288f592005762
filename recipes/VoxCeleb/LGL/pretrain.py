#!/usr/bin/env python3
"""Pre-trains a small speech model from random weights, without labels.

> python pretrain.py hparams/small_pretrain.yaml \
    --train_folders="[/path/to/an4_sessions/train]"

Spans of frames are masked, and the model predicts the masked frames by
BEST-RQ's, HuBERT's or wav2vec 2.0's objective, with or without WavLM's mixing.
The run writes a folder `model`, which transformers and SpeechBrain's W2VBert
load. After an interruption the same command resumes after the last whole epoch,
with the same result.
"""

import json
import os
import pathlib
import random
import sys
import time
from typing import Annotated, Literal

from lgl_plugin.utils.threads import spin_briefly

spin_briefly()  # before torch: OpenMP reads the setting on loading

import numpy as np
import pydantic
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml, resolve_references
from speechbrain.nnet.schedulers import update_learning_rate
from speechbrain.utils.epoch_loop import EpochCounter
from speechbrain.utils.logger import get_logger
from transformers import SeamlessM4TFeatureExtractor, Wav2Vec2BertModel

from lgl_plugin.dataio.audio import BadAudio, read_audio
from lgl_plugin.dataio.folder import find_audio
from lgl_plugin.inference.log_mel_frames import LogMels, write_log_mels
from lgl_plugin.nnet.features import model_inputs
from lgl_plugin.nnet.masked_prediction import mix_utterances, span_mask
from lgl_plugin.nnet.schedules import WarmupCosine
from lgl_plugin.runs.arguments import parse_arguments
from lgl_plugin.runs.checkpoints import WholeCheckpointer
from lgl_plugin.runs.differences import changes
from lgl_plugin.runs.lock import lock_folder
from lgl_plugin.runs.plain import plain_settings
from lgl_plugin.runs.schema import Above0, Count, Factory, Share, Text
from lgl_plugin.utils.device import keep_freed_memory
from lgl_plugin.utils.errors import explained_errors
from lgl_plugin.utils.files import write_json
from lgl_plugin.utils.progress import silence_bars, tqdm

logger = get_logger(__name__)

MODEL, SETTINGS = "model", "settings.json"
RECORD = "pretrain.json"  # written last: marks a finished run
FRAMES_PER_SECOND = 100
SHORTEST = 560  # samples of one frame of the model
PREPARING = 400  # crops on which a quantiser is fitted
PLACES = ("output_folder", "features_folder")


class Settings(pydantic.BaseModel):
    """The settings of a pre-training; any other name is an error."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    seed: Annotated[int, pydantic.Field(ge=0)]
    output_folder: Text
    train_folders: Annotated[list[Text], pydantic.Field(min_length=1)]
    features_folder: Text
    data_share: Annotated[float, pydantic.Field(gt=0, le=1)]
    objective: Text
    objectives: dict[str, Factory]
    mixing_share: Share
    crop_seconds: Above0
    batch_size: Annotated[int, pydantic.Field(ge=2)]
    epochs: Count
    steps_per_epoch: Count
    lr: Above0
    mask_share: Annotated[float, pydantic.Field(gt=0, lt=1)]
    mask_frames: Count
    precision: Literal["fp32", "bf16"]
    hidden_size: Count
    n_layers: Count
    new_model: Factory
    teacher: Text | None
    teacher_layer: Annotated[int, pydantic.Field(ge=0)]
    n_codes: Annotated[int, pydantic.Field(ge=2)]

    @pydantic.model_validator(mode="after")
    def _check_together(self):
        """Refuses settings that contradict each other, before any training."""
        if self.objective not in self.objectives:
            raise ValueError(
                f"objective: {self.objective!r} is none of the objectives "
                f"{', '.join(self.objectives)}"
            )
        if (self.objective == "kmeans_layer") != (self.teacher is not None):
            raise ValueError(
                "teacher: objective kmeans_layer needs the folder of a model, "
                "and no other objective takes one"
            )
        if self.teacher is not None:
            config = pathlib.Path(self.teacher) / "config.json"
            if not config.exists():
                raise ValueError(f"teacher: there is no {config}")
            config = json.loads(config.read_text())
            if self.teacher_layer > config["num_hidden_layers"]:
                raise ValueError(
                    f"teacher_layer: {self.teacher} has layers up to "
                    f"{config['num_hidden_layers']}"
                )
            if self.hidden_size != config["hidden_size"]:
                raise ValueError(
                    f"hidden_size: set it to {config['hidden_size']}, the "
                    f"teacher's, whose states are clustered"
                )
        frames = round(self.crop_seconds * FRAMES_PER_SECOND) // 2
        if self.mask_frames > frames:
            raise ValueError(
                f"mask_frames: a crop has {frames} frames, set at most that"
            )
        return self


class Crops(torch.utils.data.Dataset):
    """Random crops of log-mel frames, which seed and epoch determine."""

    def __init__(self, log_mels, rows, frames, size, seed):
        self.log_mels, self.rows, self.frames = log_mels, rows, frames
        self.size, self.seed, self.epoch = size, seed, 0
        lengths = np.diff(log_mels.ends, prepend=0)[rows]
        self.shares = lengths / lengths.sum()

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        rng = np.random.default_rng([self.seed, self.epoch, index])
        row = rng.choice(self.rows, p=self.shares)
        return self.log_mels.crop(row, self.frames, rng)


class Pretraining(sb.Brain):
    """Predicts masked frames; the modules are `model` and `objective`."""

    def __init__(self, settings, crops, modules, checkpointer, run_opts):
        super().__init__(
            modules,
            lambda weights: torch.optim.AdamW(weights, weight_decay=0.01),
            # Crops are drawn by epoch, so a run cannot resume within one.
            {"precision": settings.precision, "ckpt_interval_minutes": 0},
            run_opts,
            checkpointer,
        )
        self.settings, self.crops, self.records = settings, crops, []
        self.schedule = WarmupCosine(settings.lr, warmup=0.1)

    def on_stage_start(self, stage, epoch=None):
        """Makes the epoch's crops differ from those of other epochs."""
        self.crops.epoch, self.epoch = epoch, epoch
        self.sums, self.began = {}, time.process_time()

    def on_fit_batch_start(self, batch, should_step):
        """Seeds the step, so that a resumed run is the same; sets the rate."""
        settings = self.settings
        key = f"{settings.seed} {self.epoch} {self.step}"
        torch.manual_seed(random.Random(key).getrandbits(63))
        done = self.epoch - 1 + self.step / settings.steps_per_epoch
        lr = self.schedule(done / settings.epochs)
        update_learning_rate(self.optimizer, lr)

    def compute_forward(self, batch, stage):
        """Returns hidden states, unmixed frames and the mask."""
        settings = self.settings
        log_mels = batch.to(self.device)
        frames = model_inputs(log_mels)
        span = settings.mask_share, settings.mask_frames
        mask = span_mask(*frames.shape[:2], *span).to(self.device)
        inputs = frames
        if settings.mixing_share:
            inputs = model_inputs(
                mix_utterances(log_mels, settings.mixing_share)
            )
        states = self.modules.model(inputs, mask_time_indices=mask)
        return states.last_hidden_state, frames, mask

    def compute_objectives(self, predictions, batch, stage):
        """Returns the loss of the yaml's objective."""
        loss, figures = self.modules.objective(*predictions)
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
        return loss

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Records the epoch and saves it."""
        means = {name: s / self.step for name, s in self.sums.items()}
        seconds = time.process_time() - self.began
        record = {"epoch": epoch, "loss": stage_loss, "cpu_seconds": seconds}
        self.records.append({**record, **means})
        left = (self.settings.epochs - epoch) * seconds
        logger.info(
            "epoch %d of %d: loss %.3f, accuracy %.3f, %.0f s left",
            *(epoch, self.settings.epochs, stage_loss, means["accuracy"], left),
        )
        # SpeechBrain resets these only after this hook: without this line a
        # resumed epoch would begin at its end.
        self.step, self.avg_train_loss = 0, 0.0
        self.checkpointer.save_and_keep_only(meta={"records": self.records})


def read_settings(path, overrides=""):
    """Reads a yaml with its overrides.

    The second value has the settings, as plain data, that must not change when
    a run resumes.
    """
    text = pathlib.Path(path).read_text("utf-8")
    plain = plain_settings(resolve_references(text, overrides).getvalue())
    try:
        Settings.model_validate(plain)
    except pydantic.ValidationError as error:
        raise ValueError(f"{path}: {error}") from None
    values = load_hyperpyyaml(text, overrides)
    identity = {k: v for k, v in plain.items() if k not in PLACES}
    identity["objectives"] = plain["objectives"][plain["objective"]]
    identity["train_folders"] = absolute(plain["train_folders"])
    return Settings.model_construct(**values), identity


def absolute(folders):
    """Returns absolute paths, which are equal however they were typed."""
    return [os.path.abspath(folder) for folder in folders]


def waveforms(folders):
    """Yields all speech below folders, without reading the folders' names."""
    for folder in folders:
        paths = [path for path, problem in find_audio(folder) if not problem]
        if not paths:
            raise ValueError(f"train_folders: no audio below {folder}")
        for path in tqdm(paths, folder, unit="file"):
            try:
                waveform = read_audio(pathlib.Path(folder) / path)
                if len(waveform) < SHORTEST:
                    raise BadAudio(f"is shorter than {SHORTEST} samples")
                yield waveform
            except BadAudio as error:
                logger.warning("%s is left out: it %s", path, error)


def claim_features(settings):
    """Records which audio the features folder belongs to.

    Raises ValueError if its features were computed from other folders.
    """
    folder = pathlib.Path(settings.features_folder)
    made_of = folder / "train_folders.json"
    if made_of.exists():
        folders = json.loads(made_of.read_text())
        if absolute(folders) != absolute(settings.train_folders):
            raise ValueError(
                f"features_folder: {folder} has those of {folders}"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(made_of, absolute(settings.train_folders))


def try_model(settings):
    """Runs silence through the model; ValueError if it cannot be made."""
    log_mels = torch.zeros(2, FRAMES_PER_SECOND, 80)
    try:
        with torch.random.fork_rng(), torch.no_grad():
            Wav2Vec2BertModel(settings.new_model())(model_inputs(log_mels))
    except Exception as error:  # transformers raises anything
        raise ValueError(
            f"new_model: of hidden_size {settings.hidden_size} and n_layers "
            f"{settings.n_layers} there can be no model: {error}"
        ) from error


def pretrain(settings, identity, run_opts):
    """Trains the model and saves it in the output folder."""
    folder = pathlib.Path(settings.output_folder)
    lock_folder(folder)
    settings_path = folder / SETTINGS
    if settings_path.exists():
        different = changes(json.loads(settings_path.read_text()), identity)
        if different:
            raise ValueError(
                f"{folder} holds a run of other settings, take another "
                "output_folder:\n" + "\n".join(different)
            )
    is_done = (folder / RECORD).exists()
    if not is_done:  # before the features, which may take hours
        try_model(settings)
    claim_features(settings)
    write_json(settings_path, identity)
    if is_done:
        logger.info("%s is done already", folder)
        return
    features = settings.features_folder
    write_log_mels(waveforms(settings.train_folders), features)
    log_mels = LogMels(features)
    rows = np.random.default_rng(settings.seed).permutation(len(log_mels))
    rows = np.sort(rows[: max(1, round(settings.data_share * len(rows)))])
    crops = Crops(
        log_mels,
        rows,
        round(settings.crop_seconds * FRAMES_PER_SECOND),
        settings.batch_size * settings.steps_per_epoch,
        settings.seed,
    )
    torch.manual_seed(settings.seed)
    model = Wav2Vec2BertModel(settings.new_model())
    objective = settings.objectives[settings.objective](settings.hidden_size)
    sample = torch.stack([crops[n % len(crops)] for n in range(PREPARING)])
    if hasattr(objective.quantiser, "fit"):
        objective.quantiser.fit(model_inputs(sample))
    counter = EpochCounter(settings.epochs)
    modules = {"model": model, "objective": objective}
    kept = {**modules, "counter": counter}
    checkpointer = WholeCheckpointer(folder / "checkpoints", kept)
    brain = Pretraining(settings, crops, modules, checkpointer, run_opts)
    before = checkpointer.find_checkpoint()
    if before is not None:
        brain.records = before.meta["records"]
    size = settings.batch_size
    brain.fit(counter, torch.utils.data.DataLoader(crops, size))
    # Otherwise further training of the model would mask frames unnoticed.
    model.config.apply_spec_augment = False
    model.save_pretrained(folder / MODEL)
    SeamlessM4TFeatureExtractor().save_pretrained(folder / MODEL)
    hours = np.diff(log_mels.ends, prepend=0)[rows].sum() / 360_000
    record = {
        "hours": float(hours),
        "utterances": len(rows),
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": brain.records,
    }
    write_json(folder / RECORD, record)


def main():
    """Trains as the command line says."""
    with explained_errors(2, "--debug" in sys.argv):
        hparams_file, run_opts, overrides = parse_arguments(sys.argv[1:])
        if "precision" in run_opts.overridden_args:  # SpeechBrain takes it away
            overrides += f"\nprecision: {run_opts.precision}"
        settings, identity = read_settings(hparams_file, overrides)
    silence_bars(run_opts)
    keep_freed_memory()
    with explained_errors(1, bool(run_opts.get("debug"))):
        pretrain(settings, identity, run_opts)


if __name__ == "__main__":
    main()
