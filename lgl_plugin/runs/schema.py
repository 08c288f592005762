"""The names, types and ranges of all settings of the recipe's yamls."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WrapValidator,
    model_validator,
)


def _is_tagged(*tags):
    """Makes a validator of tagged entries, as `plain_settings` returns them."""

    def check(value):
        tag = str(next(iter(value), "")) if isinstance(value, dict) else ""
        if not tag.startswith(tags):
            raise ValueError(f"should be made by {' or '.join(tags)}…")
        return value

    return AfterValidator(check)


def _is_pattern(value):
    """Refuses an invalid regular expression."""
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"is no regular expression: {error}") from error
    return value


# An object, and a factory that makes a new object for each round. Without this
# check, one in place of the other would fail only when it is first used: a gate
# after all of Stage I.
Made = Annotated[Any, _is_tagged("!new:", "!apply:")]
Factory = Annotated[Any, _is_tagged("!name:")]

# Also takes an int: a folder may be called 20261127, which yaml reads as one.
Text = Annotated[
    str,
    Field(min_length=1),
    BeforeValidator(lambda x: str(x) if type(x) is int else x),
]
Pattern = Annotated[Text, AfterValidator(_is_pattern)]
Share = Annotated[float, Field(ge=0, le=1)]
Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]
From0 = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# Shorter crops have too few frames to convolve. Longer ones, such as after a
# length typed in milliseconds, would fill the memory.
CropSeconds = Annotated[float, Field(ge=0.1, le=60)]
Epochs = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Speed = Annotated[int, Field(ge=50, le=200)]
# Not a union of types: its message would name the error of each type.
Clusters = Annotated[
    int,
    Field(ge=2),
    WrapValidator(lambda x, check: x if x == "auto" else check(x)),
]
Precision = Literal["fp32", "bf16", "fp16"]

# Settings that only other entries of a yaml refer to. Stage I's methods take
# embedding_size, too.
REFERRED_TO = (
    "musan_folder",
    "rir_folder",
    "batch_size",
    "lr",
    "n_mels",
    "embedding_size",
    "speech_model",
    "n_clusters",
    "margin",
    "scale",
)


class LoaderOptions(BaseModel):
    """The yaml's dataloader_options; other keys are DataLoader's arguments."""

    model_config = ConfigDict(strict=True, extra="allow")

    batch_size: Annotated[int, Field(ge=2)]
    num_workers: Annotated[int, Field(ge=0)]

    @property
    def read_ahead(self) -> int:
        """The number of batches that the processes read in advance."""
        factor = (self.model_extra or {}).get("prefetch_factor") or 2
        return self.num_workers * factor

    @model_validator(mode="after")
    def _check_order(self) -> LoaderOptions:
        """Refuses what the recipe sets itself; torch would only after hours."""
        for name in ("sampler", "shuffle", "drop_last", "collate_fn"):
            if name in (self.model_extra or {}):
                raise ValueError(f"leave {name} out: the recipe sets it itself")
        return self


class Settings(BaseModel):
    """The settings that both stages have."""

    model_config = ConfigDict(strict=True, extra="forbid")

    stage: Literal[1, 2]
    # A step's seed is about 1,000 times this one, and seeds have 32 bits.
    seed: Annotated[int, Field(ge=0, lt=2**22)]
    output_folder: Text

    data_folder: Text
    train_folder: Text
    manifest: Text | None
    channel: Annotated[int, Field(ge=0, lt=2**15)] | None = None
    speaker_folder: bool
    verification_file: Text | None
    trial_folder: Text
    musan_folder: Text | None = None
    rir_folder: Text | None = None
    max_bad_share: Share
    allow_outside_data_folder: bool
    held_out_share: Annotated[float, Field(gt=0, lt=1)]
    selection: Literal[
        "last",
        "pseudo_trials",
        "contrastive",
        "loss",
        "silhouette",
        "agreement",
    ]
    selection_study: bool

    # Batch normalisation needs two utterances.
    batch_size: Annotated[int, Field(ge=2)]
    steps_per_epoch: Count | None
    crop_seconds: CropSeconds
    lr: Above0
    ckpt_interval_minutes: From0
    keep_checkpoints: Count
    train_logger: Made | None
    precision: Precision
    eval_precision: Precision
    dataloader_options: LoaderOptions

    # SpeechBrain's run options that change the result, from the yaml or the
    # command line; if not given, SpeechBrain's defaults apply. A negative
    # max_grad_norm would reverse the gradient.
    max_grad_norm: Above0 | None = None
    grad_accumulation_factor: Count | None = None
    optimizer_step_limit: Count | None = None
    remove_vector_weight_decay: bool | None = None

    sample_rate: Annotated[int, Field(ge=1000, le=10**7)]
    n_mels: Count
    embedding_size: Count
    speech_model: Text | None = None
    augment: Made
    new_encoder: Factory
    backend: Made | None = None
    opt_class: Factory
    lr_annealing: Made

    @model_validator(mode="after")
    def _check_channel(self) -> Settings:
        """Refuses a channel beside a manifest, which names channels itself."""
        if self.manifest and self.channel is not None:
            raise ValueError(
                "channel is for the audio that is found in train_folder: in a "
                "manifest of your own, name it in a column `channel`"
            )
        return self


class Stage1Settings(Settings):
    """The settings of Stage I."""

    number_of_epochs: Count
    speeds: Annotated[list[Speed], Field(min_length=1)]
    # stage1.yaml leaves it out, so that runs begun before this key can resume.
    overlapping_crops: bool = False
    method: Factory
    ssps_epochs: Epochs
    ssps_cluster_epochs: Count
    ssps_cluster: Made
    ssps_backend: Made | None
    ssps_log_mel_share: Annotated[float, Field(ge=0, lt=1)]
    ssps_cluster_twice: bool
    ssps_source: Literal["own", "nearest"]


class Stage2Settings(Settings):
    """The settings of Stage II."""

    stage1_yaml: Text
    pretrained_encoder: Text | None
    labels_file: Text | None
    encoder_init: Literal["first", "previous"]
    classifier_init: Literal["random", "centroids"]
    n_iterations: Count
    n_clusters: Clusters
    min_cluster_size: Count
    balanced_sampling: bool
    classifier_epochs: Count
    gated_epochs: Epochs
    large_margin_epochs: Epochs

    anchor: From0
    freeze_batch_statistics: bool
    trained_weights: Pattern | None
    large_margin_crop_seconds: CropSeconds
    margin: From0
    scale: Above0
    new_first_encoder: Factory | None = None
    new_last_encoder: Factory | None
    cluster: Made
    cluster_backend: Made | None
    log_mel_share: Annotated[float, Field(ge=0, lt=1)]
    cluster_twice: bool
    new_classifier: Factory
    aam: Made
    large_margin: Made
    no_gate: Made
    gate: Made
    correct_labels: Factory | None
    relabel: Factory | None

    @property
    def first_encoder(self) -> Factory:
        """The factory of the encoder that the first round clusters by."""
        return self.new_first_encoder or self.new_encoder

    @model_validator(mode="after")
    def _check_together(self) -> Stage2Settings:
        """Refuses settings that contradict each other."""
        for name, work, none in (
            ("large_margin_epochs", "trains on what the gate selected", 0),
            ("relabel", "works in the gated epochs", "null"),
            ("correct_labels", "works in the gated epochs", "null"),
        ):
            if getattr(self, name) and not self.gated_epochs:
                raise ValueError(
                    f"{name} {work}: set gated_epochs to 1 or more, or "
                    f"{name} to {none}"
                )
        if self.correct_labels and next(iter(self.gate)).endswith(".NoGate"):
            raise ValueError(
                "correct_labels relabels what the gate rejects, and NoGate "
                "rejects nothing: set correct_labels to null, or another gate"
            )
        if self.relabel and self.correct_labels:
            raise ValueError(
                "relabel and correct_labels both replace labels: set one of "
                "them to null"
            )
        if self.relabel and self.large_margin_epochs:
            raise ValueError(
                "large_margin_epochs goes on with the clusters' labels, which "
                "relabel gives up: set large_margin_epochs to 0, or relabel "
                "to null"
            )
        if self.anchor and self.new_last_encoder is not None:
            raise ValueError(
                "anchor holds an encoder near its start, and new_last_encoder "
                "has none: set one of them to 0 or null"
            )
        if self.trained_weights and self.new_last_encoder is not None:
            raise ValueError(
                "trained_weights leaves the others as an encoder came, and "
                "new_last_encoder begins at random: set one of them to null"
            )
        for name, encoder in (
            ("new_last_encoder", "new_last_encoder"),
            ("new_first_encoder", "new_encoder under new_first_encoder"),
        ):
            if self.freeze_batch_statistics and getattr(self, name) is not None:
                raise ValueError(
                    "freeze_batch_statistics keeps those that an encoder came "
                    f"with, and {encoder} has none: set "
                    f"freeze_batch_statistics to False, or {name} to null"
                )
        if self.classifier_init == "centroids":
            if self.new_first_encoder is not None:
                raise ValueError(
                    "classifier_init: centroids are those of "
                    "new_first_encoder, in whose space new_encoder does not "
                    "begin: set classifier_init to random"
                )
            # Centroids fit only the encoder whose embeddings were clustered.
            if self.encoder_init == "first" and self.n_iterations > 1:
                raise ValueError(
                    "classifier_init: centroids needs encoder_init: previous, "
                    "whose embeddings they are centroids of; encoder_init: "
                    "first needs classifier_init: random"
                )
            if self.new_last_encoder is not None:
                raise ValueError(
                    "classifier_init: centroids does not go with "
                    "new_last_encoder, whose untrained encoder has another "
                    "space: set classifier_init to random, or "
                    "new_last_encoder to null"
                )
        return self


# Settings without effect if another one, a number of epochs, is 0.
ONLY_WITH = {
    **{
        name: "ssps_epochs"
        for name in Stage1Settings.model_fields
        if name.startswith("ssps_") and name != "ssps_epochs"
    },
    "gate": "gated_epochs",
    "large_margin": "large_margin_epochs",
    "large_margin_crop_seconds": "large_margin_epochs",
}
