"""`lgl verify`: scores encoders on trial lists: EER, minDCF, DET curve.

> lgl verify results/lgl/1/export/iter5 /path/to/VoxCeleb1/wav \
    --trials vox1_o.txt vox1_e.txt vox1_h.txt \
    --output_folder=results/vox1 --cohort=/path/to/VoxCeleb2/wav
"""

import argparse
from typing import Any

from lgl_plugin.cli.common import (
    ENCODER_HELP,
    LONE_CHANNEL,
    add_channel,
    add_machine,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    add = parser.add_argument
    add("encoders", nargs="+", metavar="encoder", help=ENCODER_HELP)
    add("audio", help="folder where the lists' paths begin")
    add(
        "--trials",
        dest="trial_lists",
        metavar="LIST",
        nargs="+",
        required=True,
        help="trial lists, lines of label path path",
    )
    add("--output_folder", required=True, help="folder of the results")
    add(
        "--cohort",
        help="folder of unlabelled audio; with it, whitening, PLDA and AS-norm",
    )
    add(
        "--top",
        type=int,
        help="nearest of the cohort that count; none: 300, or all if fewer",
    )
    add(
        "--cohort_utterances",
        type=int,
        help="how many files of the cohort are drawn; none: 20000",
    )
    add("--seed", type=int, default=0, help="of what is drawn")
    add_channel(parser, LONE_CHANNEL)
    add_machine(parser)


def run(**options: Any) -> None:
    """Writes scores and figures, and prints the error rates."""
    from lgl_plugin.report.verification import (
        AT_THRESHOLD,
        has_thresholds,
        table,
        verify_encoders,
    )

    metrics = verify_encoders(**options)
    print()
    for name, of_list in metrics.items():
        nontargets = of_list["trials"] - of_list["targets"]
        print(
            f"{name}: {of_list['targets']:,} target and {nontargets:,} "
            "non-target trials"
        )
    print(f"\n{table(metrics)}\n")
    if has_thresholds(metrics):
        print(
            f"{AT_THRESHOLD}: non-targets accepted and targets rejected at the "
            "encoder's own threshold. It holds for the cosine only."
        )
    print(
        f"In {options['output_folder']}: scores.txt, "
        "metrics.json, det.png, det.svg"
        + (", in a folder for each list" if len(metrics) > 1 else "")
    )
