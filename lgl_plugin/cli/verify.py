"""`lgl verify`: scores an encoder on a trial list: EER, minDCF, DET curve.

> lgl verify results/lgl/1/export/iter5 veri_test2.txt \
    /path/to/VoxCeleb1/wav --output_folder=results/vox1_o \
    --cohort=/path/to/VoxCeleb2/wav
"""

from __future__ import annotations

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    parser.add_argument(
        "encoder", help="exported folder, or another that SpeechBrain loads"
    )
    parser.add_argument(
        "verification_file", help="trial list, lines of label path path"
    )
    parser.add_argument("trial_folder", help="where the list's paths begin")
    parser.add_argument(
        "--output_folder", required=True, help="folder of the results"
    )
    parser.add_argument(
        "--cohort", help="folder of unlabelled audio; with it, AS-norm"
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
    from lgl_plugin.report.verification import table, verify_encoder

    metrics = verify_encoder(**options)
    nontargets = metrics["trials"] - metrics["targets"]
    print(
        f"\n{metrics['targets']:,} target and {nontargets:,} non-target trials"
        f"\n\n{table(metrics)}\n\nIn {options['output_folder']}: scores.txt, "
        "metrics.json, det.png, det.svg"
    )
