"""`lgl attribute`: shows which bands, moments and layers make a score.

> lgl attribute results/lgl/1/export/iter5 vox1_o.txt /path/to/VoxCeleb1/wav \
    --output_folder=results/inside
"""

import argparse
from typing import Any

from lgl_plugin.cli.common import ENCODER_HELP, LONE_CHANNEL, add_channel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    add = parser.add_argument
    add("encoder", help=ENCODER_HELP)
    add("trials", help="trial list, lines of label path path")
    add("audio", help="folder where the list's paths begin")
    add("--output_folder", required=True, help="folder of the page")
    add(
        "--number",
        type=int,
        default=100,
        help="trials that are drawn, half of them targets",
    )
    add(
        "--steps",
        type=int,
        default=512,
        help="the most steps of a path; a trial takes no more than it needs",
    )
    add(
        "--over",
        nargs="+",
        choices=("features", "waveform", "layers"),
        default=("features", "waveform", "layers"),
        help="paths to take; those that the encoder lacks are left out",
    )
    add("--seed", type=int, default=0, help="of what is drawn")
    add_channel(parser, LONE_CHANNEL)
    add("--device", help="none: the GPU if there is one")


def run(**options: Any) -> None:
    """Writes the page and its numbers and prints what parts add."""
    from lgl_plugin.report.attribution import HEADER, attribute, rows_of
    from lgl_plugin.utils.tables import markdown_table

    result = attribute(**options)
    print(f"\n{markdown_table(HEADER, rows_of(result['added']))}\n")
    print(f"Page: {options['output_folder']}/index.html, with csv and json")
