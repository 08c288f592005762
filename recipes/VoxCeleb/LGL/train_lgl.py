#!/usr/bin/env python3
"""Recipe for self-supervised speaker recognition with loss-gated learning.

Stage I trains an ECAPA-TDNN by SimCLR with augmentation adversarial training;
Stage II clusters its embeddings into pseudo-speakers and trains on these,
first on all, then on those that a loss gate lets through, and does so again.

> python train_lgl.py hparams/stage1.yaml --data_folder=/path/to/VoxCeleb2
> python train_lgl.py hparams/stage2.yaml --data_folder=/path/to/VoxCeleb2

The same command after an interruption goes on where it stopped.
"""

import os
import sys

import speechbrain as sb
from hyperpyyaml import load_hyperpyyaml, resolve_references

from lgl_plugin.runs.run import Run
from lgl_plugin.runs.settings import plain_settings
from lgl_plugin.training.stage2 import train_stage1, train_stage2

if __name__ == "__main__":
    hparams_file, run_opts, overrides = sb.parse_arguments(sys.argv[1:])
    sb.utils.distributed.ddp_init_group(run_opts)

    with open(hparams_file, encoding="utf-8") as fin:
        settings = resolve_references(fin, overrides).getvalue()
    hparams = load_hyperpyyaml(settings)

    # A folder for each stage, for the log and the yaml after overrides.
    stage = f"stage{hparams['stage']}"
    if run_opts.get("debug"):
        stage = os.path.join("debug", stage)
    else:
        # Another run's folder is refused before anything is written there.
        folder, number = hparams["output_folder"], hparams["stage"]
        Run(folder, number, plain_settings(settings))
    sb.create_experiment_directory(
        experiment_directory=os.path.join(hparams["output_folder"], stage),
        hyperparams_to_save=hparams_file,
        overrides=overrides,
    )
    train = train_stage1 if hparams["stage"] == 1 else train_stage2
    train(hparams, run_opts, settings)
