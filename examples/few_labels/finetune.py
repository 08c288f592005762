#!/usr/bin/env python3
"""Fine-tunes an exported encoder on a few labelled speakers.

The audio lies in one folder per speaker. The encoder's batch statistics stay
as they are: those of five speakers would spoil them for all others.

> python finetune.py finetune.yaml --data_folder=/my/speakers \
    --encoder_source=results/lgl/1/export/iter5 --output_folder=tuned
> lgl compare tuned/encoder one.wav other.wav
"""

import contextlib
import pathlib
import shutil
import sys

import numpy as np
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml

from lgl_plugin.dataio.dataset import crop_dataset
from lgl_plugin.dataio.manifest import load_manifest
from lgl_plugin.dataio.prepare import prepare_manifest
from lgl_plugin.inference.extractor import load_extractor
from lgl_plugin.runs.arguments import parse_arguments


class FineTuner(sb.Brain):
    """Trains encoder and classifier by additive angular margin softmax."""

    def on_stage_start(self, stage, epoch=None):
        """Draws other crops in each epoch."""
        self.hparams.train_data.set_epoch(epoch)

    def compute_forward(self, batch, stage):
        """Returns cosines (batch, speakers)."""
        crops = batch.sig.data[:, 0].to(self.device)
        embeddings = self.modules.encoder(self.hparams.augment(crops))
        return self.modules.classifier(embeddings[:, None])[:, 0]

    def compute_objectives(self, cosines, batch, stage):
        """Returns the mean loss."""
        speakers = torch.as_tensor(batch.label, device=self.device)
        return self.hparams.compute_cost(cosines, speakers).mean()

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Prints the epoch's loss."""
        print(f"epoch {epoch}: loss {stage_loss:.3f}")


if __name__ == "__main__":
    hparams_file, run_opts, overrides = parse_arguments(sys.argv[1:])
    with open(hparams_file, encoding="utf-8") as fin:
        hparams = load_hyperpyyaml(fin, overrides)
    folder = pathlib.Path(hparams["output_folder"])
    source = pathlib.Path(hparams["encoder_source"])
    if not source.is_dir():  # what is tuned takes its place in a copy
        raise SystemExit(f"encoder_source: {source} is no exported folder")
    sb.create_experiment_directory(folder, hparams_file, overrides)

    listed = folder / "manifest.csv"
    prepare_manifest(hparams["data_folder"], listed, speaker_folder=True)
    manifest = load_manifest(listed, hparams["data_folder"])
    extract = load_extractor(source)
    train_data = crop_dataset(
        manifest,
        np.arange(len(manifest)),
        hparams["crop_seconds"],
        labels=manifest.speakers,
        sample_rate=extract.sample_rate,
        seed=hparams["seed"],
    )

    encoder = extract.encoder.eval()
    with contextlib.suppress(ValueError):  # without batch normalisation
        encoder.freeze_statistics()
    n_speakers = int(manifest.speakers.max()) + 1
    with torch.no_grad():
        size = encoder(torch.randn(2, extract.sample_rate)).shape[-1]
    classifier = hparams["new_classifier"](
        input_size=size, out_neurons=n_speakers
    )
    tuner = FineTuner(
        {"encoder": encoder, "classifier": classifier},
        hparams["opt_class"],
        {**hparams, "train_data": train_data},
        run_opts,
    )
    tuner.fit(
        range(1, hparams["number_of_epochs"] + 1),
        train_data,
        train_loader_kwargs={**hparams["dataloader_options"], "shuffle": True},
    )

    # SpeechBrain loads this: the folder as it was, with the new weights. Its
    # threshold is the old encoder's; `lgl verify` on a list of yours finds one.
    # encoder.onnx has the old weights.
    tuned, no_onnx = folder / "encoder", shutil.ignore_patterns("*.onnx")
    shutil.copytree(source, tuned, dirs_exist_ok=True, ignore=no_onnx)
    torch.save(encoder.network.state_dict(), tuned / "embedding_model.ckpt")
    print(f"{n_speakers} speakers, {len(manifest)} files: {tuned}")
