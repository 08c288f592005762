"""`lgl pack`: packs a manifest's audio into shards, for slow file systems."""

import argparse
import shlex
from typing import Any

from lgl_plugin.cli.common import show_notices


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    add = parser.add_argument
    add("manifest", help="the csv that names the utterances")
    add("folder", help="where to write, empty or new")
    add("--data_root", required=True, help="what $data_root stands for in it")
    add("--shard_mb", type=float, default=512, help="in MiB")
    add("--num_workers", type=int, default=8, help="processes that read audio")
    add("--max_bad_share", type=float, default=0.02, help="of the utterances")
    add(
        "--decode",
        action="store_true",
        help="write wav of 16 bits (32 where floats exceed full scale), which "
        "is read many times faster than ogg and mp3",
    )
    add(
        "--allow_outside_data_folder",
        dest="allow_outside",
        action="store_true",
        help="the manifest may name audio that is not below data_root",
    )


def run(**options: Any) -> None:
    """Writes the shards and their manifest."""
    from lgl_plugin.dataio.shards import write_shards

    show_notices()  # such as the numbers of utterances and shards
    manifest = write_shards(**options)
    words = ["lgl", "train", str(manifest.parent), f"--manifest={manifest}"]
    print(f"Train on the shards with: {shlex.join(words)}")
