#!/usr/bin/env python3
"""Recipe for self-supervised speaker recognition with loss-gated learning.

Stage I trains an encoder by SimCLR with augmentation adversarial training, or
by another method. Stage II repeats rounds: each clusters the embeddings into
pseudo-speakers and trains on all utterances, then on those of low loss, which
the gate selects.

> python train_lgl.py hparams/stage1.yaml --data_folder=/path/to/VoxCeleb2
> python train_lgl.py hparams/stage2.yaml --data_folder=/path/to/VoxCeleb2

After an interruption the same command resumes: each step below is done once,
and its files are in the folder of its name.
"""

import functools
import sys

from lgl_plugin.utils.threads import spin_briefly

spin_briefly()  # before torch: OpenMP reads the setting on loading

import speechbrain as sb

from lgl_plugin.dataio.partners import Partners
from lgl_plugin.evaluation.observer import observer_of
from lgl_plugin.methods.ssps import SSPSBrain
from lgl_plugin.methods.stage1 import Stage1Brain
from lgl_plugin.report.build import try_to_write_report
from lgl_plugin.runs.arguments import parse_arguments
from lgl_plugin.runs.settings import load_settings
from lgl_plugin.training.session import Session
from lgl_plugin.training.sizes import check_clusters
from lgl_plugin.training.stage1 import (
    check_method,
    grouping,
    score_baselines,
    stage1_modules,
    train_stage1_phase,
)
from lgl_plugin.training.stage2 import Round
from lgl_plugin.training.start import check_inputs, check_trials, find_encoder
from lgl_plugin.utils.errors import explained_errors, logged_errors
from lgl_plugin.utils.signals import stop


def train_stage1(session):
    """Paper, section 2.1: an encoder that tells utterances apart."""
    settings, run = session.settings, session.run

    def baselines(folder):
        session.seed(0)
        score_baselines(session, folder)

    def stage1(folder):
        """Trains by the yaml's method on two crops of each utterance."""
        session.seed(1)
        train_stage1_phase(
            session, Stage1Brain, stage1_modules(session), folder
        )

    def ssps(folder):
        """Continues with positives from other utterances of the same cluster.

        Self-supervised positive sampling, Lepage and Dehak 2025.
        """
        session.seed(2)
        modules = stage1_modules(session, run.folder / "stage1")
        partners = Partners(len(session.manifest))
        brain_class = functools.partial(
            SSPSBrain,
            group=group,
            partners=partners,
            cluster_epochs=settings.ssps_cluster_epochs,
        )
        train_stage1_phase(session, brain_class, modules, folder, partners)

    check_method(session)
    group = grouping(session) if settings.ssps_epochs else None
    run.step("baselines", baselines, run.identity())
    run.step("stage1", stage1)
    session.publish("stage1", run.checksum("stage1"))
    if settings.ssps_epochs:
        run.step("ssps", ssps, run.checksum("stage1"))
        session.publish("ssps", run.checksum("ssps"))
    try_to_write_report(run.folder)


def train_stage2(session):
    """Paper, sections 2.2 and 3: rounds of clustering and training."""
    first = find_encoder(session)
    check_clusters(session.settings, len(session.rows))
    check_trials(session, first)
    for number in range(1, session.settings.n_iterations + 1):
        train_round(Round(session, number, first))
        try_to_write_report(session.run.folder)


def train_round(round_):
    """Embeds, clusters, trains on all labels, then through the gate."""
    settings, session = round_.settings, round_.session

    def classifier(folder):
        """Trains by AAM-softmax on every pseudo-label."""
        round_.fit(folder, *round_.start(), settings.no_gate)

    def gated(folder):
        """Trains only on utterances of low loss, whose labels are reliable.

        Paper, equation 3.
        """
        round_.fit(folder, *round_.load("classifier"), round_.primed_gate())

    def large_margin(folder):
        """Fine-tunes the selected with longer crops and a larger margin.

        Thienpondt et al. 2021. The larger margin raises the losses above the
        gate's threshold, so the utterances that the gate selected at their last
        visit are used.
        """
        rows, size = round_.selected_rows(), session.batch_size
        if len(rows) < size:  # the gated encoder is the round's last
            round_.log(phase=folder.name, utterances=len(rows), batch_size=size)
            return
        round_.fit(
            folder,
            *round_.load("gated"),
            settings.no_gate,
            aam=settings.large_margin,
            rows=rows,
            crop_seconds=settings.large_margin_crop_seconds,
        )

    round_.step("embeddings", round_.extract)
    round_.step("labels", round_.cluster)
    round_.step("classifier", classifier)
    round_.step("gated", gated)
    if round_.is_last and settings.large_margin_epochs:
        round_.step("large_margin", large_margin)
    session.publish(round_.name, round_.made_from)


STAGES = {1: train_stage1, 2: train_stage2}


def train(
    hparams_file, run_opts, overrides, plan=None, later=None, stages=STAGES
):
    """Trains the stage that a yaml names.

    `hparams_file`, `run_opts` and `overrides` are those that SpeechBrain
    parsed. `plan` lists the steps of a job with further stages, by which the
    screen counts. `later` are the settings of Stage II, if it follows: audio
    that does not fit them is refused before Stage I. Raises TrainingFailed if
    the stage fails. Errors before the stage begins are raised as they are.
    """
    with stop.on_signals():
        settings, text = load_settings(hparams_file, overrides, run_opts)
        if settings.stage not in stages:  # before a folder is written
            raise ValueError(
                f"{hparams_file} is of stage {settings.stage}, which "
                "train_lgl.py trains and this script does not"
            )
        session = Session(settings, text, run_opts, observer_of)
        session.run.plan = plan or session.run.plan
        if later is not None:
            begun = "stage1" in session.run.done
            check_inputs(later, session.manifest, read=not begun)
        with logged_errors(session.debug):
            stages[settings.stage](session)


def main(stages=STAGES):
    """Trains the stage that the command line's yaml names."""
    with explained_errors(2, "--debug" in sys.argv):
        hparams_file, run_opts, overrides = parse_arguments(sys.argv[1:])
        sb.utils.distributed.ddp_init_group(run_opts)
        train(hparams_file, run_opts, overrides, stages=stages)


if __name__ == "__main__":
    main()
