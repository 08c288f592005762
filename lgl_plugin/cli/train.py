"""`lgl train`: trains an encoder on a folder of audio, both stages as one job.

> lgl train /my/audio --output_folder=results/mine
> lgl train /my/audio --output_folder=results/mine --n_clusters=200 --seed=2

A `--pretrained_encoder` takes the place of Stage I.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lgl_plugin.cli.recipe import RECIPE, load_recipe
from lgl_plugin.runs.arguments import (
    goes_to,
    key_of,
    keys_of_stages,
    not_typed,
    paired_once,
)

if TYPE_CHECKING:
    from lgl_plugin.runs.schema import Settings

PRESETS = {
    "small": ("small_stage1.yaml", "small_stage2.yaml"),
    "paper": ("stage1.yaml", "stage2.yaml"),
}
# The number of files from which the paper's preset trains for long enough. Its
# epoch sees each file once: with 50,000 files, the last round's 20 epochs train
# an encoder from scratch in 4,000 steps.
LARGE = 50_000
# Files whose headers are read to estimate the duration of all.
SAMPLE = 400
# The least mean number of files in a cluster: the paper preset's number of
# clusters suits its own corpus, and may be too large for another.
FILES_A_CLUSTER = 10
CHOICES = "train.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    add = parser.add_argument
    parser.usage = (
        "lgl train AUDIO --output_folder RUN [--preset {small,paper}] "
        "[--KEY=VALUE ...]"
    )
    add("audio", help="folder of audio, one speaker a file")
    add(
        "--output_folder",
        required=True,
        help="folder of the run; the same command again goes on there",
    )
    add_preset(parser)
    parser.epilog = (
        "Any key of the preset's yamls and any option of SpeechBrain may "
        "follow as --key=value, such as --n_clusters=200 or --device=cpu. A "
        "key of one stage goes to that stage. With --pretrained_encoder, "
        "Stage II alone trains. Speakers' names are not read "
        "unless --speaker_folder=True says that the first folders bear them."
    )
    parser.set_defaults(settings=None)


def add_preset(parser: argparse.ArgumentParser) -> None:
    """Declares the option that names a preset."""
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help=f"none: paper for {LARGE:,} files or more on a GPU, else small",
    )


def run(
    audio: str,
    output_folder: str,
    preset: str | None,
    settings: list[str] | None,
) -> None:
    """Trains both stages, or continues an earlier call."""
    import speechbrain as sb
    import torch

    from lgl_plugin.utils.distributed import from_main

    recipe = load_recipe()
    given = as_pairs(settings)
    # A mistyped key is refused before the audio is listed.
    choices = {"preset": preset or "small", "n_clusters": 2}
    parsed, settings = parse(choices, audio, output_folder, given)
    check_files(settings[-1])
    if not torch.distributed.is_initialized():
        sb.utils.distributed.ddp_init_group(parsed[0][1])
    device = parsed[0][1].get("device")
    choices = from_main(choose, settings[0], preset, device)
    parsed, settings = parse(choices, audio, output_folder, given)
    for arguments in parsed[:-1]:
        recipe.train(*arguments, settings[-1])
    recipe.train(*parsed[-1])


def check_files(settings: Settings) -> None:
    """Refuses missing or invalid labels and encoders of Stage II."""
    from lgl_plugin.dataio.given import read_names
    from lgl_plugin.training.start import check_encoder

    if settings.labels_file:
        read_names(settings.labels_file)
    if settings.pretrained_encoder:
        check_encoder(settings)


def parse(
    choices: dict,
    audio: str,
    output_folder: str | pathlib.Path,
    given: list[str],
) -> tuple[list[tuple], list[Settings]]:
    """Returns each stage's arguments for the recipe's `train`, and settings.

    Both are checked.
    """
    from lgl_plugin.runs.arguments import parse_arguments
    from lgl_plugin.runs.plain import plain_settings
    from lgl_plugin.runs.run import planned_steps
    from lgl_plugin.runs.settings import did_you_mean, load_settings

    valid = set().union(*keys(choices["preset"]))
    parsed = []
    for path, words, own in stages(choices, audio, output_folder, given):
        parsed.append(parse_arguments([str(path), *words], own))
        # Checked here: a stage alone would suggest only its own keys.
        for name in plain_settings(parsed[-1][2]):
            if name not in valid:
                hint = did_you_mean(name, valid)
                raise ValueError(f"there is no setting {name!r}{hint}")
    settings = [
        load_settings(path, overrides, run_opts)[0]
        for path, run_opts, overrides in parsed
    ]
    plan = planned_steps({f"stage {one.stage}": dict(one) for one in settings})
    return [(*arguments, plan) for arguments in parsed], settings


def choose(
    settings: Settings, preset: str | None, device: str | None = None
) -> dict:
    """Chooses preset and number of clusters, or reads an earlier choice.

    A resumed run keeps its choice even if files came or went.
    """
    import json

    from lgl_plugin.runs.state import STATE
    from lgl_plugin.training.session import check_folder
    from lgl_plugin.utils.files import write_json

    check_folder(settings)
    run = pathlib.Path(settings.output_folder)
    path = run / CHOICES
    # A choice counts only once the run has begun: a call that failed before,
    # such as for a wrong folder, must not decide for the next one.
    begun = path.exists() and (run / STATE).exists()
    if begun:
        choices = json.loads(path.read_text(encoding="utf-8"))
        if preset in (None, choices["preset"]):
            return choices
    choices = suggest(*survey(settings), preset, device)
    # Not stored for a begun run: the run refuses another preset, and the next
    # call must not read that preset.
    if not (run / STATE).exists():
        write_json(path, choices)
    return choices


def suggest(
    n_files: int,
    hours: float,
    preset: str | None = None,
    device: str | None = None,
) -> dict:
    """Returns, and prints, a preset and a number of clusters.

    They depend on the amount of audio and the device. A given preset is kept.
    """
    from lgl_plugin.runs.settings import read_preset
    from lgl_plugin.utils.device import check_device

    if preset is None:
        large = n_files >= LARGE and check_device(device).startswith("cuda")
        preset = "paper" if large else "small"
    stage2 = RECIPE / "hparams" / PRESETS[preset][1]
    n_clusters = read_preset(stage2)["n_clusters"]
    words = "an estimated number of clusters"
    if n_clusters != "auto":
        n_clusters = max(2, min(n_clusters, n_files // FILES_A_CLUSTER))
        words = f"{n_clusters:,} clusters, a guess of the number of speakers"
    print(
        f"{n_files:,} files, about {hours:.1f} hours: the preset {preset} with "
        f"{words}, unless --preset, --n_clusters or --cluster say otherwise"
    )
    return {"preset": preset, "n_clusters": n_clusters}


def survey(settings: Settings) -> tuple[int, float]:
    """Counts the utterances to train on, and their hours.

    For a folder, the hours are estimated from a sample.
    """
    import os
    import random

    from lgl_plugin.dataio.audio import BadAudio, probe
    from lgl_plugin.dataio.folder import find_audio
    from lgl_plugin.dataio.manifest import load_manifest
    from lgl_plugin.dataio.prepare import check_folders

    if settings.manifest:
        manifest = load_manifest(
            settings.manifest,
            settings.data_folder,
            settings.allow_outside_data_folder,
        )
        return len(manifest), float(manifest.durations.sum()) / 3600
    audio = os.path.abspath(settings.train_folder)
    check_folders(audio, os.path.abspath(settings.data_folder))
    files = [name for name, problem in find_audio(audio) if problem is None]
    seconds = []
    for name in random.Random(0).sample(files, min(len(files), SAMPLE)):
        try:
            seconds.append(probe(os.path.join(audio, name)).seconds)
        except BadAudio:
            continue
    mean = sum(seconds) / max(len(seconds), 1)
    return len(files), mean * len(files) / 3600


def stages(
    choices: dict,
    audio: str,
    output_folder: str | pathlib.Path,
    given: list[str],
) -> Iterator[tuple[pathlib.Path, list[str], dict[str, Any]]]:
    """Yields each stage's yaml, its options, and the defaults of `lgl train`.

    An option replaces a default. A pre-trained encoder replaces Stage I: then
    an option of that stage alone raises ValueError.
    """
    from lgl_plugin.runs.arguments import as_typed
    from lgl_plugin.runs.plain import plain_settings

    usual = {
        "data_folder": audio,
        "train_folder": audio,
        "trial_folder": audio,
        "output_folder": output_folder,
        "verification_file": None,
        "speaker_folder": False,
        "n_clusters": choices["n_clusters"],
    }
    own = keys(choices["preset"])
    typed = {key_of(option): option.partition("=")[2] for option in given}
    # A user's own --cluster may fix the number of clusters itself.
    cluster = typed.get("cluster", "")
    if cluster.startswith("!") and "<n_clusters>" not in cluster:
        del usual["n_clusters"]
    usual = not_typed(usual, given)
    line = as_typed(name := "pretrained_encoder", typed.get(name, "null"))
    skipped = plain_settings(line)[name] is not None
    unused = sorted(key for key in typed if not goes_to(key, 2, own))
    if skipped and unused:
        raise ValueError(
            f"--{unused[0]} is a setting of Stage I, which is not trained: "
            "--pretrained_encoder takes its place. Leave one of them out."
        )
    for stage, name in enumerate(PRESETS[choices["preset"]], start=1):
        if stage == 1 and skipped:
            continue
        yield (
            RECIPE / "hparams" / name,
            [word for word in given if goes_to(key_of(word), stage, own)],
            {k: v for k, v in usual.items() if goes_to(k, stage, own)},
        )


def keys(preset: str) -> list[set[str]]:
    """Returns the keys that each stage of a preset takes."""
    return keys_of_stages(RECIPE / "hparams" / name for name in PRESETS[preset])


def as_pairs(words: list[str] | None) -> list[str]:
    """Joins `--key value` to `--key=value`; refuses a word without a key."""
    pairs = paired_once(words or [])
    for word in pairs:
        if not word.startswith("--"):
            raise ValueError(
                f"{word!r} belongs to no option: keys of the yaml are given as "
                "--key=value, one folder of audio before them"
            )
    return pairs
