"""Options and notices that several verbs of `lgl` share."""

from __future__ import annotations

import argparse
import logging
import pathlib

ENCODER = "exported folder, another of SpeechBrain's, or CAM++'s weights"


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Declares the options that say where and how audio is embedded."""
    parser.add_argument("--device", help="none: the GPU if there is one")
    parser.add_argument(
        "--num_workers",
        type=int,
        help="processes that read audio; none: 0 on a CPU, 8 beside a GPU",
    )


def add_channel(parser: argparse.ArgumentParser) -> None:
    """Declares the option that chooses a channel of stereo audio."""
    parser.add_argument(
        "--channel",
        type=int,
        help="the one to read of files with several, from 0, as of calls with "
        "a speaker on each; none: their mean",
    )


def cosine(text: str) -> float:
    """Reads a threshold; a percentage would make everybody a stranger."""
    value = float(text)
    if not -1 <= value <= 1:
        raise argparse.ArgumentTypeError(
            f"{text} is no cosine, which lies from -1 to 1"
        )
    return value


def left_out(store: str | pathlib.Path) -> str:
    """Says how many files of a folder could not be embedded; "" if none."""
    lines = pathlib.Path(store, "bad_files.txt").read_text("utf-8").splitlines()
    if not lines:
        return ""
    return f" {len(lines):,} could not be used: {store}/bad_files.txt."


def show_notices() -> None:
    """Shows the package's notices on stderr, and of others warnings alone."""
    logging.getLogger("lgl_plugin").setLevel(logging.INFO)
    # SpeechBrain names what it switches off in torch, each time.
    logging.getLogger("speechbrain.utils.quirks").setLevel(logging.WARNING)
    if logging.lastResort is not None:  # shows what no handler takes
        logging.lastResort.setLevel(logging.INFO)
