#!/usr/bin/env python3
"""Costs of training on any amount of speech, from counted operations.

> python benchmarks/cost.py
> python benchmarks/cost.py --hours=1e7 --gpus=1000 --share=0.5

Counts the operations of a step of every yaml, with its own encoder, method,
crops and lengths, on two utterances; and those of embedding an utterance. The
hours are these operations divided by a share of what the data sheet says that
an H200 does (--share, --bf16, --tf32): estimates, until one has been timed.
"""

import pathlib

import torch
from common import RATE, arguments, report
from torch.utils.flop_counter import FlopCounterMode

from lgl_plugin.methods.method import embedded
from lgl_plugin.runs.settings import load_settings

HPARAMS = pathlib.Path(__file__).parents[1] / "hparams"
STAGE1 = ("stage1", "moco", "vicreg", "dino", "rdino", "sdpn")
BATCH = 2
VOXCELEB2 = 1_092_009  # utterances of 7.8 s


def settings_of(name):
    """Reads a preset."""
    path = HPARAMS / f"{name}.yaml"
    return load_settings(path, "data_folder: .", {"device": "cpu"})[0]


def counted(work):
    """Returns the operations of a call for each utterance of its batch."""
    with FlopCounterMode(display=False) as flop:
        work()
    return flop.get_total_flops() / BATCH


def crops(settings, n):
    """Makes crops (BATCH, n, samples)."""
    length = int(settings.crop_seconds * settings.sample_rate)
    return torch.randn(BATCH, n, length)


def stage1_step(settings):
    """Makes a step of Stage I, but for the optimiser."""
    encoder = settings.new_encoder()
    size = settings.embedding_size
    method = settings.method(encoder, size, VOXCELEB2)
    given = crops(settings, 2)
    rows = torch.arange(BATCH)

    def step():
        views, taught = method.views(given, settings.augment)
        embeddings = [embedded(encoder, group) for group in views]
        targets = method.teach(taught)
        if method.adversary is not None:
            detached = [group.detach() for group in embeddings]
            method.adversary_loss(detached).backward()
        method(embeddings, targets, rows, 0.5)[0].backward()

    return step


def stage2_step(settings, new_encoder):
    """Makes a step of Stage II, but for the optimiser."""
    encoder = new_encoder()
    classifier = settings.new_classifier(out_neurons=settings.n_clusters)
    given = crops(settings, 1)[:, 0]
    labels = torch.arange(BATCH)

    def step():
        cosines = classifier(encoder(given)[:, None])[:, 0]
        settings.aam(cosines, labels).sum().backward()

    return step


def embedding(encoder, seconds):
    """Makes the embedding of whole utterances."""
    wavs = torch.randn(BATCH, int(RATE * seconds))

    @torch.inference_mode()
    def embed():
        encoder.eval()(wavs)

    return embed


def clustering(kmeans, size, n_utterances):
    """Returns k-means's operations for each of so many utterances."""
    sample = kmeans.max_points_per_centroid * kmeans.n_clusters
    # Iterations see a sample; then all go to their nearest centroid.
    passes = kmeans.n_iterations * min(1.0, sample / n_utterances) + 1
    return 2 * kmeans.n_clusters * size * passes


def costs(seconds, n_utterances):
    """Yields what is done, operations an utterance, passes, TF32 or not."""
    for name in STAGE1:
        settings = settings_of(name)
        flop = counted(stage1_step(settings))
        slow = settings.precision == "fp32"
        yield f"Stage I, {name}.yaml", flop, settings.number_of_epochs, slow
    settings = settings_of("stage2")
    epochs = settings.classifier_epochs + settings.gated_epochs
    rounds = settings.n_iterations
    flop = counted(stage2_step(settings, settings.new_encoder))
    yield "Stage II, rounds before the last", flop, epochs * (rounds - 1), False
    flop = counted(stage2_step(settings, settings.new_last_encoder))
    yield "Stage II, the last round", flop, epochs, False
    flop = counted(embedding(settings.new_encoder(), seconds))
    yield "embedding", flop, rounds, False
    flop = clustering(settings.cluster, settings.embedding_size, n_utterances)
    yield "clustering", flop, rounds, True


def main():
    """Counts, and prints a row for each."""
    parser = arguments(__doc__, device=False, repeats=False)
    parser.add_argument("--hours", type=float, help="of speech; VoxCeleb2's")
    parser.add_argument("--seconds", type=float, default=7.8, help="a file")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--bf16", type=float, default=989, help="TFLOP/s")
    parser.add_argument("--tf32", type=float, default=494, help="TFLOP/s")
    options = parser.parse_args()
    n_utterances = VOXCELEB2
    if options.hours:
        n_utterances = round(3600 * options.hours / options.seconds)
    rows = []
    for what, flop, passes, slow in costs(options.seconds, n_utterances):
        rate = (options.tf32 if slow else options.bf16) * 1e12 * options.share
        hours = flop * passes * n_utterances / rate / 3600
        rows.append(
            {
                "what": what,
                "GFLOP an utterance": flop / 1e9,
                "passes": passes,
                "in": "TF32" if slow else "bf16",
                "PFLOP": flop * passes * n_utterances / 1e15,
                "hours of one": hours,
                f"hours of {options.gpus:,}": hours / options.gpus,
            }
        )
    title = f"{n_utterances:,} utterances, {options.share:g} of an H200's peak"
    report(rows, title, options.json)


if __name__ == "__main__":
    main()
