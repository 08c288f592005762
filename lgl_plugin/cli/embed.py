"""`lgl embed`: embeds every audio file of a folder.

> lgl embed results/lgl/1/export/iter5 /my/audio embeddings
"""

import argparse

from lgl_plugin.cli.common import (
    ENCODER_HELP,
    add_channel,
    add_machine,
    left_out,
    show_notices,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    parser.add_argument("encoder", help=ENCODER_HELP)
    parser.add_argument("audio", help="folder of wav, flac, ogg and mp3 files")
    parser.add_argument("output", help="folder of the vectors")
    add_channel(parser)
    add_machine(parser)


def run(
    encoder: str,
    audio: str,
    output: str,
    channel: int | None,
    device: str | None,
    num_workers: int | None,
) -> None:
    """Writes the vectors, one row per file, and the files' names."""
    from lgl_plugin.inference.folder import embed_folder

    show_notices()
    _, found = embed_folder(
        encoder, audio, output, device, num_workers, channel=channel
    )
    print(
        f"{len(found.utterances):,} files, {found.vectors.shape[1]} "
        f"dimensions.{left_out(output)}\nIn {output}: vectors.npy; "
        "utterances.csv, whose lines name its rows"
    )
