"""Options and notices that several verbs of `lgl` share."""

from __future__ import annotations

import argparse
import json
import logging
import math
import pathlib
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from speechbrain.utils.run_opts import RunOptions

ENCODER = "exported folder, another of SpeechBrain's, or CAM++'s weights"


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Declares the options that say where and how audio is embedded."""
    parser.add_argument("--device", help="none: the GPU if there is one")
    parser.add_argument(
        "--num_workers",
        type=int,
        help="processes that read audio; none: 0 on a CPU, 8 beside a GPU",
    )


def cosine(text: str) -> float:
    """Reads a threshold; a percentage would make everybody a stranger."""
    value = float(text)
    if not -1 <= value <= 1:
        raise argparse.ArgumentTypeError(
            f"{text} is no cosine, which lies from -1 to 1"
        )
    return value


def show_notices() -> None:
    """Shows the package's notices on stderr, and of others warnings alone."""
    logging.getLogger("lgl_plugin").setLevel(logging.INFO)
    # SpeechBrain names what it switches off in torch, each time.
    logging.getLogger("speechbrain.utils.quirks").setLevel(logging.WARNING)
    if logging.lastResort is not None:  # shows what no handler takes
        logging.lastResort.setLevel(logging.INFO)


def parse_settings(
    path: str | pathlib.Path, words: list[str], own: dict[str, Any]
) -> tuple[str, RunOptions, str]:
    """Returns what SpeechBrain makes of a yaml and words, and a verb's own.

    The latter stay out of the words: SpeechBrain quotes nothing, so that it
    would read "Tape" of a folder "Tape #3".
    """
    import speechbrain as sb

    _, run_opts, overrides = sb.parse_arguments([str(path), *words])
    lines = (f"{key}: {as_yaml(value)}" for key, value in own.items())
    return str(path), run_opts, "\n".join([overrides, *lines])


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
    if isinstance(value, str | pathlib.Path):
        text = yaml.safe_dump(str(value), default_style='"', width=math.inf)
        return text.rstrip("\n")
    return json.dumps(value)
