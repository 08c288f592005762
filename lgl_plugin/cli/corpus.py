"""`lgl corpus`: makes the synthetic corpus that `make demo` trains on."""

from __future__ import annotations

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    parser.add_argument("folder", help="where to make it")
    parser.add_argument("--speakers", type=int, default=60, help="to train on")
    parser.add_argument(
        "--test_speakers", type=int, default=20, help="held out, in trials.txt"
    )
    parser.add_argument(
        "--sessions", type=int, default=4, help="channels of each speaker"
    )
    parser.add_argument(
        "--utterances", type=int, default=5, help="of each session"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        nargs=2,
        default=(2.0, 8.0),
        metavar=("SHORTEST", "LONGEST"),
        help="of an utterance",
    )
    parser.add_argument("--seed", type=int, default=1, help="of everything")
    parser.add_argument(
        "--workers", type=int, help="processes; by default one per core"
    )


def run(folder: str, **options: Any) -> None:
    """Makes the corpus, unless it is there already."""
    from lgl_plugin.dataio.synthetic import make_corpus

    made = make_corpus(folder, **options)
    print(f"{folder}: {'made' if made else 'already made'}")
