"""`lgl verify`: scores encoders on trial lists: EER, minDCF, DET curve.

> lgl verify results/lgl/1/export/iter5 /path/to/VoxCeleb1/wav \
    --trials vox1_o.txt vox1_e.txt vox1_h.txt \
    --output_folder=results/vox1 --cohort=/path/to/VoxCeleb2/wav
"""

from __future__ import annotations

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    parser.add_argument(
        "encoders",
        nargs="+",
        metavar="encoder",
        help="exported folder, another of SpeechBrain's, or CAM++'s weights",
    )
    parser.add_argument("audio", help="folder where the lists' paths begin")
    parser.add_argument(
        "--trials",
        dest="trial_lists",
        metavar="LIST",
        nargs="+",
        required=True,
        help="trial lists, lines of label path path",
    )
    parser.add_argument(
        "--output_folder", required=True, help="folder of the results"
    )
    parser.add_argument(
        "--cohort",
        help="folder of unlabelled audio; with it, whitening and AS-norm",
    )
    parser.add_argument(
        "--top", type=int, default=300, help="nearest of the cohort that count"
    )
    parser.add_argument(
        "--cohort_utterances",
        type=int,
        default=20000,
        help="how many files of the cohort are drawn",
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--device", help="none: the GPU if there is one")
    parser.add_argument(
        "--num_workers", type=int, default=0, help="processes that read audio"
    )


def run(**options: Any) -> None:
    """Writes scores and figures and prints the error rates."""
    from lgl_plugin.report.verification import table, verify_encoders

    metrics = verify_encoders(**options)
    print()
    for name, of_list in metrics.items():
        nontargets = of_list["trials"] - of_list["targets"]
        print(
            f"{name}: {of_list['targets']:,} target and {nontargets:,} "
            "non-target trials"
        )
    print(
        f"\n{table(metrics)}\n\nIn {options['output_folder']}: scores.txt, "
        "metrics.json, det.png, det.svg"
        + (", in a folder for each list" if len(metrics) > 1 else "")
    )
