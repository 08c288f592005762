"""`lgl corpus`: makes the synthetic corpus that `make demo` trains on."""

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    add = parser.add_argument
    add("folder", help="where to make it")
    add("--speakers", type=int, default=60, help="to train on")
    add("--test_speakers", type=int, default=20, help="held out, in trials.txt")
    add("--sessions", type=int, default=4, help="channels of each speaker")
    add("--utterances", type=int, default=5, help="of each session")
    add(
        "--seconds",
        type=float,
        nargs=2,
        default=(2.0, 8.0),
        metavar=("SHORTEST", "LONGEST"),
        help="of an utterance",
    )
    add("--seed", type=int, default=1, help="of everything")
    add("--workers", type=int, help="processes; by default one per core")


def run(folder: str, **options: Any) -> None:
    """Makes the corpus, unless it is there already."""
    from lgl_plugin.dataio.synthetic import make_corpus

    made = make_corpus(folder, **options)
    print(f"{folder}: {'made' if made else 'already made'}")
