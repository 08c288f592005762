"""Options and notices that several verbs of `lgl` share."""

from __future__ import annotations

import argparse
import logging
import pathlib

ENCODER_HELP = "exported folder, another of SpeechBrain's, or CAM++'s weights"
# Help on --channel for verbs that cannot leave a file out.
LONE_CHANNEL = "a file with a single channel is read as it is"


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Declares the options that say where and how audio is embedded."""
    parser.add_argument("--device", help="none: the GPU if there is one")
    parser.add_argument(
        "--num_workers",
        type=int,
        help="processes that read audio; none: 0 on a CPU, 8 beside a GPU",
    )


def add_channel(
    parser: argparse.ArgumentParser,
    without: str = "files without it are left out",
) -> None:
    """Declares the option that chooses a channel of stereo audio.

    `without` says what happens to files without the channel.
    """
    parser.add_argument(
        "--channel",
        type=channel,
        help="the one to read of calls with a speaker on each, from 0; "
        f"{without}; none: the mean of all channels",
    )


def channel(text: str) -> int:
    """Reads a channel's number; one below 0 would count from the last."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text}: channels count from 0")
    return number


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
    from lgl_plugin.dataio.bad_files import BadFiles

    path = pathlib.Path(store, "bad_files.txt")
    number = len(BadFiles(path).reasons)  # 0 if the log was deleted
    return f" {number:,} could not be used: {path}." if number else ""


def show_notices() -> None:
    """Shows this package's notices on stderr, of other packages warnings."""
    # DEBUG, because tracebacks for log.txt are logged at that level. The screen
    # shows INFO.
    logging.getLogger("lgl_plugin").setLevel(logging.DEBUG)
    # Without these notices of SpeechBrain: what it switches off in torch, and
    # the seed of each yaml that is read.
    for name in ("quirks", "seed"):
        logging.getLogger(f"speechbrain.utils.{name}").setLevel(logging.WARNING)
    if logging.lastResort is not None:  # shows what no handler takes
        logging.lastResort.setLevel(logging.INFO)
