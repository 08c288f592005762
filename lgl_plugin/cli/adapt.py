"""`lgl adapt`: makes an encoder better for a folder of unlabelled audio.

> lgl adapt results/lgl/1/export/iter5 /my/audio --output_folder=adapted
"""

from __future__ import annotations

import argparse
import copy
import functools
import pathlib
import shutil
import sys
from typing import TYPE_CHECKING, Any

from lgl_plugin.cli.common import (
    ENCODER_HELP,
    add_channel,
    add_machine,
    show_notices,
)
from lgl_plugin.cli.recipe import RECIPE, load_recipe
from lgl_plugin.cli.train import as_pairs
from lgl_plugin.runs.arguments import key_of, not_typed
from lgl_plugin.utils.errors import EXPLAINED, TrainingFailed, logged_message

if TYPE_CHECKING:
    from lgl_plugin.adaptation.ladder import Ladder

PRESET = RECIPE / "hparams" / "adapt.yaml"

# Settings of the training that the verb sets itself, with the message for a
# user who gives one. With another manifest or other labels, training could read
# the recordings that judge it.
OWN = {
    **dict.fromkeys(
        [
            *("data_folder", "train_folder", "trial_folder", "manifest"),
            *("pretrained_encoder", "new_encoder", "new_first_encoder"),
            *("new_last_encoder", "embedding_size", "sample_rate"),
        ],
        "encoder and audio say that",
    ),
    "labels_file": "--labels has the labels that you give",
    "allow_outside_data_folder": "all audio lies in the folder that you name",
}
# Hours of audio below which --train warns. On 0.7 hours training CAM++ did harm
# with two seeds of three; on 4 hours it helped (docs/adapt_measured.md).
FEW_HOURS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    add = parser.add_argument
    add("encoder", help=ENCODER_HELP)
    add("audio", help="folder of audio, one speaker a file")
    add(
        "--output_folder",
        required=True,
        help="folder of the run; the same command again goes on there",
    )
    add(
        "--train",
        action="store_true",
        help="tries the network, too, trained on through the loss gate; all of "
        "it, or what --trained_weights names",
    )
    add(
        "--labels",
        help="with --train: csv of utterance,speaker that you give for some "
        "of the recordings, to be trained on",
    )
    add(
        "--labelled",
        action="store_true",
        help="the model card says that labels went into the encoder",
    )
    add("--license", default="other", help="of the weights, such as cc-by-4.0")
    add_channel(parser)
    add_machine(parser)
    parser.epilog = (
        "With --train any key of hparams/adapt.yaml may follow as "
        "--key=value, such as --lr=0.0003."
    )
    parser.set_defaults(settings=None)


def run(
    encoder: str,
    audio: str,
    output_folder: str,
    train: bool,
    labels: str | None,
    labelled: bool,
    license: str,
    channel: int | None,
    device: str | None,
    num_workers: int | None,
    settings: list[str] | None,
) -> None:
    """Tries the rungs; writes the adapted encoder and a page."""
    from lgl_plugin.adaptation.ladder import Ladder
    from lgl_plugin.adaptation.rungs import TRAINED, Rung
    from lgl_plugin.adaptation.verdict import Verdict
    from lgl_plugin.dataio.given import read_names

    given = [word for word in as_pairs(settings) if word != "--debug"]
    for option in given:
        if key_of(option) in OWN:
            raise ValueError(f"{option}: {OWN[key_of(option)]}; leave it out")
        check_batch_option(option)
    if given and not train:
        check_settings(audio, given)  # first refuses a mistyped option
        raise ValueError(f"{given[0]} is a setting of training: add --train")
    if labels and not train:
        raise ValueError("--labels are for training alone: add --train")
    if labels:
        read_names(labels)  # a wrong path shows before the audio is listed
    show_notices()
    folder = pathlib.Path(output_folder)
    changed = check_settings(audio, given) if given else []
    ladder = Ladder(
        encoder, audio, folder, device, num_workers, labels, channel, train
    )
    if given:
        check_training(ladder, given)
    trained = ladder.run.done.get(TRAINED)
    if not train and trained and Rung(TRAINED, Verdict(**trained)).kept:
        raise ValueError(
            f"{folder} holds a trained encoder, and without --train there "
            "would be another in its place: add --train, which trains nothing "
            "twice, or name another --output_folder"
        )
    ladder.try_backends()
    # A training takes long and may fail, so the result before it is written
    # first. Not if a training was begun: the folder may hold its result.
    said = f"The result so far is in {folder}."
    if not train or TRAINED not in ladder.run.sources:
        said = write_result(ladder, labelled, license)
    if train:
        hours = ladder.manifest.durations.sum() / 3600
        if hours < FEW_HOURS:
            print(
                f"Warning: --train has {hours:.1f} hours of audio. On so "
                "little it mostly takes time and is not kept. If it is, check "
                "the result on trials that you trust.",
                file=sys.stderr,
            )
        work = functools.partial(train_network, given=given)
        try:
            ladder.try_training(work, changed)
        except EXPLAINED as error:
            raise TrainingFailed(
                f"--train: {logged_message(error)}\n"
                f"What came before it is kept. {said}"
            ) from error
        said = write_result(ladder, labelled, license)
    print(said)


def write_result(ladder: Ladder, labelled: bool, license: str) -> str:
    """Writes the adapted encoder and the page; returns the message on them."""
    from lgl_plugin.report.adaptation import conclusion, write_page

    exported = ladder.folder / "export" / "adapted"
    if ladder.kept:
        ladder.export(exported, labelled, license)
    elif exported.exists():  # of verdicts that no longer hold
        shutil.rmtree(exported)
    page = write_page(ladder, exported)
    said = f"{conclusion(ladder.rungs)}\n{page}"
    if ladder.kept:
        said += f"\nThe adapted encoder: {exported}"
    return said


def check_batch_option(option: str) -> None:
    """Refuses a batch_size in dataloader_options, which would win over ours.

    Otherwise the message would be about a batch_size that the user never typed.
    """
    from lgl_plugin.runs.arguments import as_typed
    from lgl_plugin.runs.plain import plain_settings

    name, _, value = option.removeprefix("--").partition("=")
    if name != "dataloader_options":
        return
    options = plain_settings(as_typed(name, value))[name]
    if isinstance(options, dict) and "batch_size" in options:
        raise ValueError(
            f"{option}: name the batch by --batch_size="
            f"{options['batch_size']} instead"
        )


def check_settings(audio: str, given: list[str]) -> list[str]:
    """Returns how training differs from the yaml, one line for each setting.

    Raises ValueError if a setting is wrong. Otherwise training would, but only
    after the other rungs.
    """
    from lgl_plugin.runs.differences import changes
    from lgl_plugin.runs.plain import plain_settings
    from lgl_plugin.runs.settings import plain_settings_of, settings_of

    own = {"data_folder": audio}
    # No trial of the modules: they may fit the given encoder, not the yaml's.
    _, text = settings_of([str(PRESET), *given], own, trial=False)
    return changes(plain_settings_of([str(PRESET)], own), plain_settings(text))


def check_training(ladder: Ladder, given: list[str]) -> None:
    """Refuses weights that the encoder lacks, and sizes that are too large.

    Training would refuse them, too, but only after the other rungs. The number
    of recordings to train on is not known yet: up to half are kept out to judge
    the training.
    """
    from lgl_plugin.adaptation.split import SHARE
    from lgl_plugin.runs.settings import settings_of
    from lgl_plugin.training.sizes import check_clusters, split_rows
    from lgl_plugin.training.start import made_to_train

    number, n_labelled = len(ladder.manifest), 0
    if ladder.given is not None:
        n_labelled = len(ladder.given.rows)
    left = max(number - int(SHARE * number), n_labelled)
    own = own_settings(ladder, left, given)
    settings, _ = settings_of([str(PRESET), *given], own, trial=False)
    encoder = copy.deepcopy(ladder.extract.encoder)
    made_to_train(settings, lambda: encoder)
    try:
        split_rows(settings, left)
        check_clusters(settings, left)
    except ValueError as error:
        raise ValueError(
            f"training may have only {left} of the {number} recordings, as the "
            f"others may be kept to judge it by. {error}"
        ) from error


def own_settings(
    ladder: Ladder, n_utterances: int, given: list[str], **more: Any
) -> dict[str, Any]:
    """Returns the settings of a training that the verb sets itself.

    The batch is smaller if there are few utterances. An option that the user
    gives replaces a setting.
    """
    from lgl_plugin.nnet.batch_norm import batch_norms
    from lgl_plugin.runs.settings import read_preset

    own = {
        "data_folder": ladder.audio.absolute(),
        "batch_size": min(read_preset(PRESET)["batch_size"], n_utterances // 2),
        **more,
    }
    if not batch_norms(ladder.extract.encoder.network):
        own["freeze_batch_statistics"] = False
    return not_typed(own, given)


def train_network(ladder: Ladder, given: list[str]) -> pathlib.Path:
    """Trains a ladder's network by a round of Stage II; returns its weights."""
    from lgl_plugin.runs.arguments import parse_arguments
    from lgl_plugin.runs.pretrained import encoder_settings
    from lgl_plugin.runs.run import encoder_steps
    from lgl_plugin.runs.state import read_state
    from lgl_plugin.runs.weights import ENCODER as WEIGHTS

    folder = ladder.training
    listed = ladder.folder / "trained.csv"
    labels = ladder.folder / "trained_labels.csv"
    ladder.list_trained(listed, labels)
    audio = ladder.audio.absolute()
    more = {
        "train_folder": audio,
        "trial_folder": audio,
        "output_folder": folder,
        "manifest": listed,
        "pretrained_encoder": ladder.weights,
        "dataloader_options": {"num_workers": ladder.extract.num_workers},
    }
    # Given unless the weights describe the same encoder: those of CAM++ do not
    # tell the features.
    if encoder_settings(ladder.weights) != ladder.settings:
        more.update(ladder.settings)  # new_encoder and sample_rate
        more["embedding_size"] = ladder.embedded.vectors.shape[-1]
    if ladder.given is not None:
        more["labels_file"] = labels
    own = own_settings(ladder, len(ladder.trained), given, **more)
    words = [str(PRESET), f"--device={ladder.device}", *given]
    load_recipe().train(*parse_arguments(words, own))
    return folder / encoder_steps(folder, read_state(folder))[-1] / WEIGHTS
