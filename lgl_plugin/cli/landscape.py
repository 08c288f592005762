"""`lgl landscape`: draws the loss around a run's checkpoints and between them.

> lgl landscape results/lgl/1
> lgl landscape results/gated results/ungated --only iter1/gated
"""

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    add = parser.add_argument
    add("runs", nargs="+", metavar="run", help="output_folder of a run")
    add(
        "--output_folder",
        help="folder of the page; none: report/landscape of the first run",
    )
    add(
        "--only",
        nargs="+",
        metavar="STEP",
        help="steps to draw, such as iter1/start iter1/gated; none: all",
    )
    add("--utterances", type=int, default=128, help="that the loss is of")
    add("--points", type=int, default=13, help="of a surface, each way")
    add("--radius", type=float, default=0.5, help="in lengths of the filters")
    add(
        "--batch_norm",
        choices=("running", "batch"),
        default="running",
        help="statistics that the checkpoint keeps, or those of each batch",
    )
    add("--seed", type=int, default=0, help="of what is drawn")
    add("--device", help="none: the GPU if there is one")


def run(**options: Any) -> None:
    """Prints the sharpness of each step and writes page and numbers."""
    from lgl_plugin.report.landscape import draw_landscapes

    draw_landscapes(**options)
