"""`lgl adapt`: makes an encoder better for a folder of unlabelled audio.

> lgl adapt results/lgl/1/export/iter5 /my/audio --output_folder=adapted
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
from typing import TYPE_CHECKING, Any

from lgl_plugin.cli.common import ENCODER, add_machine, show_notices
from lgl_plugin.cli.recipe import RECIPE
from lgl_plugin.cli.train import as_pairs, key_of, load_recipe

if TYPE_CHECKING:
    from lgl_plugin.inference.adapt import Ladder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    add = parser.add_argument
    add("encoder", help=ENCODER)
    add("audio", help="folder of audio, one speaker a file")
    add(
        "--output_folder",
        required=True,
        help="folder of the run; the same command again goes on there",
    )
    add(
        "--train",
        action="store_true",
        help="tries the whole network, too, trained on through the loss gate",
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
    device: str | None,
    num_workers: int | None,
    settings: list[str] | None,
) -> None:
    """Tries the rungs, and writes what is kept and a page."""
    from lgl_plugin.inference.adapt import Ladder
    from lgl_plugin.report.adaptation import conclusion, write_page

    given = [word for word in as_pairs(settings) if word != "--debug"]
    if given and not train:
        raise ValueError(f"{given[0]} is a setting of training: add --train")
    if labels and not train:
        raise ValueError("--labels are for training alone: add --train")
    show_notices()
    folder = pathlib.Path(output_folder)
    ladder = Ladder(encoder, audio, folder, device, num_workers, labels)
    ladder.try_backends()
    if train:
        if labels:
            given.append(f"--labels_file={labels}")
        ladder.try_training(functools.partial(train_network, given=given))
    exported = folder / "export" / "adapted"
    if ladder.kept:
        ladder.export(exported, labelled, license)
    page = write_page(ladder, exported)
    print(f"{conclusion(ladder.rungs)}\n{page}")
    if ladder.kept:
        print(f"The adapted encoder: {exported}")


def train_network(ladder: Ladder, given: list[str]) -> pathlib.Path:
    """Trains a ladder's network by a round of Stage II, on rows to fit on."""
    import speechbrain as sb

    from lgl_plugin.runs.settings import read_preset

    yaml = RECIPE / "hparams" / "adapt.yaml"
    folder = ladder.training
    listed = ladder.folder / "fitted.csv"
    ladder.list_fitted(listed)
    factory = as_yaml(ladder.settings["new_encoder"])
    options = {
        "data_folder": ladder.audio.absolute(),
        "output_folder": folder,
        "manifest": listed,
        "pretrained_encoder": ladder.weights,
        "new_encoder": factory,
        "embedding_size": ladder.parts.first.shape[-1],
        "sample_rate": ladder.settings["sample_rate"],
        "batch_size": min(
            read_preset(yaml)["batch_size"], len(ladder.fitted) // 2
        ),
        "device": ladder.device,
    }
    named = {key_of(option) for option in given}
    words = [f"--{k}={v}" for k, v in options.items() if k not in named]
    load_recipe().train(*sb.parse_arguments([str(yaml), *words, *given]))
    return folder / "iter1" / "gated" / "embedding_model.ckpt"


def as_yaml(value: Any) -> str:
    """Returns plain settings as HyperPyYAML in one line."""
    if isinstance(value, dict):
        tag = next(iter(value), "")
        if tag.startswith("!"):
            return f"{tag} {as_yaml(value[tag] or {})}"
        inner = ", ".join(f"{k}: {as_yaml(v)}" for k, v in value.items())
        return f"{{{inner}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(as_yaml, value))}]"
    return json.dumps(value)
