#!/usr/bin/env python3
"""SpeechBrain's ordinary supervised speaker recipe, with the loss gate.

Its shape is that of recipes/VoxCeleb/SpeakerRec/train_speaker_embeddings.py;
the labels may be wrong in places: speakers of a crowd-sourced corpus, tracks
of a diarisation, clusters. One line differs for the gate, and is marked.

> python train.py train.yaml --data_folder=/path/to/audio \
    --train_annotation=train.csv --valid_annotation=dev.csv \
    --out_n_neurons=1000

The same without the gate: --gate='!new:lgl_plugin.nnet.gates.NoGate'
"""

import random
import sys

import speechbrain as sb
from hyperpyyaml import load_hyperpyyaml

from lgl_plugin.nnet.losses import gated_mean
from lgl_plugin.runs.arguments import parse_arguments


class SpeakerBrain(sb.Brain):
    """Trains an encoder and a classifier of speakers."""

    def compute_forward(self, batch, stage):
        """Cosines to the speakers, (batch, 1, speakers)."""
        batch = batch.to(self.device)
        wavs, lengths = batch.sig
        if stage == sb.Stage.TRAIN:
            wavs = self.modules.augment(wavs)
        features = self.modules.compute_features(wavs)
        features = self.modules.mean_var_norm(features, lengths)
        embeddings = self.modules.embedding_model(features, lengths)
        return self.modules.classifier(embeddings), lengths

    def compute_objectives(self, predictions, batch, stage):
        """The loss, over the utterances that the gate lets through."""
        cosines, lengths = predictions
        speakers, _ = batch.spk_id_encoded
        losses = self.hparams.compute_cost(cosines[:, 0], speakers[:, 0])
        if stage == sb.Stage.TRAIN:
            # The loss gate; without it: return losses.mean()
            return gated_mean(losses, self.modules.gate(losses))
        self.error_metrics.append(batch.id, cosines, speakers, lengths)
        return losses.mean()

    def on_stage_start(self, stage, epoch=None):
        """Empties the error statistics."""
        if stage != sb.Stage.TRAIN:
            self.error_metrics = self.hparams.error_stats()

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Logs the epoch, moves the learning rate, saves a checkpoint."""
        if stage == sb.Stage.TRAIN:
            self.train_loss = stage_loss
            return
        error_rate = self.error_metrics.summarize("average")
        # StepScheduler counts from 0: the first epoch has the yaml's rate.
        old_lr, new_lr = self.hparams.lr_annealing(epoch - 1)
        sb.nnet.schedulers.update_learning_rate(self.optimizer, new_lr)
        self.hparams.train_logger.log_stats(
            stats_meta={"epoch": epoch, "lr": old_lr},
            train_stats={"loss": self.train_loss},
            valid_stats={"loss": stage_loss, "ErrorRate": error_rate},
        )
        self.checkpointer.save_and_keep_only(
            meta={"ErrorRate": error_rate}, min_keys=["ErrorRate"]
        )


def prepare_datasets(hparams):
    """The datasets of both csv files, their speakers as numbers."""
    train, valid = (
        sb.dataio.dataset.DynamicItemDataset.from_csv(
            csv_path=hparams[name],
            replacements={"data_root": hparams["data_folder"]},
        )
        for name in ("train_annotation", "valid_annotation")
    )
    chunk = int(hparams["sample_rate"] * hparams["sentence_len"])

    @sb.utils.data_pipeline.takes("wav", "start", "stop")
    @sb.utils.data_pipeline.provides("sig")
    def read_chunk(wav, start, stop):
        first = random.randint(int(start), max(int(start), int(stop) - chunk))
        last = min(first + chunk, int(stop))
        return sb.dataio.dataio.read_audio(
            {"file": wav, "start": first, "stop": last}
        )

    speakers = sb.dataio.encoder.CategoricalEncoder()
    speakers.expect_len(hparams["out_n_neurons"])

    @sb.utils.data_pipeline.takes("spk_id")
    @sb.utils.data_pipeline.provides("spk_id", "spk_id_encoded")
    def encode_speaker(spk_id):
        yield spk_id
        yield speakers.encode_sequence_torch([spk_id])

    datasets = [train, valid]
    sb.dataio.dataset.add_dynamic_item(datasets, read_chunk)
    sb.dataio.dataset.add_dynamic_item(datasets, encode_speaker)
    speakers.load_or_create(
        path=f"{hparams['output_folder']}/label_encoder.txt",
        from_didatasets=[train],
        output_key="spk_id",
    )
    sb.dataio.dataset.set_output_keys(datasets, ["id", "sig", "spk_id_encoded"])
    return train, valid


if __name__ == "__main__":
    hparams_file, run_opts, overrides = parse_arguments(sys.argv[1:])
    sb.utils.distributed.ddp_init_group(run_opts)
    with open(hparams_file, encoding="utf-8") as source:
        hparams = load_hyperpyyaml(source, overrides)
    sb.create_experiment_directory(
        experiment_directory=hparams["output_folder"],
        hyperparams_to_save=hparams_file,
        overrides=overrides,
    )
    train_data, valid_data = prepare_datasets(hparams)
    brain = SpeakerBrain(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    brain.fit(
        hparams["epoch_counter"],
        train_data,
        valid_data,
        train_loader_kwargs={**hparams["dataloader_options"], "shuffle": True},
        valid_loader_kwargs=hparams["dataloader_options"],
    )
