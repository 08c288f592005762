"""`lgl adapt`: makes an encoder better for a folder of unlabelled audio.

> lgl adapt results/lgl/1/export/iter5 /my/audio --output_folder=adapted
"""

from __future__ import annotations

import argparse

from lgl_plugin.cli.embed import add_machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    parser.add_argument(
        "encoder", help="exported folder, or another that SpeechBrain loads"
    )
    parser.add_argument("audio", help="folder of audio, one speaker a file")
    parser.add_argument(
        "--output_folder",
        required=True,
        help="folder of the run; the same command again goes on there",
    )
    parser.add_argument(
        "--labelled",
        action="store_true",
        help="the model card says that labels went into the encoder",
    )
    parser.add_argument(
        "--license", default="other", help="of the weights, such as cc-by-4.0"
    )
    add_machine(parser)


def run(
    encoder: str,
    audio: str,
    output_folder: str,
    labelled: bool,
    license: str,
    device: str | None,
    num_workers: int | None,
) -> None:
    """Tries the rungs, and writes what is kept and a page."""
    import pathlib

    from lgl_plugin.cli.notices import show_notices
    from lgl_plugin.inference.adapt import Ladder
    from lgl_plugin.report.adaptation import conclusion, write_page

    show_notices()
    folder = pathlib.Path(output_folder)
    ladder = Ladder(encoder, audio, folder, device, num_workers or 0)
    ladder.try_backends()
    exported = folder / "export" / "adapted"
    if ladder.kept:
        ladder.export(exported, labelled, license)
    page = write_page(ladder, exported)
    print(f"{conclusion(ladder.rungs)}\n{page}")
    if ladder.kept:
        print(f"The adapted encoder: {exported}")
