"""A round of Stage II: its steps, pseudo-labels and weights."""

import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from speechbrain.utils.distributed import main_process_only

from lgl_plugin.clustering.first_step import means_of
from lgl_plugin.clustering.seeding import seeded
from lgl_plugin.clustering.vectors import (
    cluster_sizes,
    normalised,
    without_small,
)
from lgl_plugin.dataio.labels import LABELS, round_labels, write_labels
from lgl_plugin.dataio.manifest import Strings
from lgl_plugin.inference.log_mel_baseline import log_mel_encoder
from lgl_plugin.inference.store import Embeddings
from lgl_plugin.metrics.agreement import ami
from lgl_plugin.nnet.encoders import Encoder
from lgl_plugin.nnet.given import GivenRows
from lgl_plugin.runs.run import CENTROIDS, GATE, SCORES
from lgl_plugin.runs.schema import Stage2Settings
from lgl_plugin.runs.weights import (
    BACKEND,
    CLASSIFIER,
    ENCODER,
    load_weights,
    read_tensors,
    save_weights,
)
from lgl_plugin.training.clusters import pseudo_speakers, whitened_log_mels
from lgl_plugin.training.fit import fit, part_of
from lgl_plugin.training.loss_gated import LossGatedBrain
from lgl_plugin.training.relabelling import RelabellingBrain
from lgl_plugin.training.session import Session
from lgl_plugin.training.start import START, made_to_train, new_anchor
from lgl_plugin.utils.files import (
    atomic_write,
    checksum,
    load_arrays,
    save_arrays,
    write_json,
)

LOG_MELS = "log_mels"  # below the first round's embeddings


class Round:
    """One round of Stage II in its folder, `iter<number>`.

    A recipe calls the steps. This class saves each step's results and loads
    them in the next.

    Arguments
    ---------
    session : Session
        Settings, data and run folder.
    number : int
        Number of the round, from 1.
    first : pathlib.Path
        Weights of Stage II's first encoder.
    """

    def __init__(self, session: Session, number: int, first: pathlib.Path):
        self.session = session
        self.given = session.given  # labels that the user gave
        self.settings = session.settings
        self.number = number
        self.name = f"iter{number}"
        self.folder = session.run.folder / self.name
        self.first = first
        before = session.run.folder / f"iter{number - 1}" / "gated" / ENCODER
        self.source = first if number == 1 else before
        self.is_last = number == self.settings.n_iterations
        wide = self.settings.new_last_encoder if self.is_last else None
        self.is_wide = wide is not None
        self.new_encoder = wide or self.settings.new_encoder
        # Makes the encoder whose weights are in `source`.
        self.new_source = self.settings.new_encoder
        if number == 1:
            self.new_source = self.settings.first_encoder
        self.made_from = checksum(self.source)
        self.n_steps = 0

    def step(self, name: str, work: Callable) -> None:
        """Does a step of the round, unless it is done; see `Run.step`."""
        self.session.seed(10 * self.number + self.n_steps)
        self.n_steps += 1
        run, name = self.session.run, f"{self.name}/{name}"
        run.step(name, work, self.made_from)
        self.made_from = run.checksum(name)

    def log(self, **record: Any) -> None:
        """Adds a record to the run's metrics."""
        self.session.log(stage=2, iteration=self.number, **record)

    def extract(self, folder: pathlib.Path) -> dict:
        """Embeds all utterances by the encoder of the previous round."""
        encoder = self.new_source()
        load_weights(encoder.network, self.source)
        if self.settings.log_mel_share and self.number == 1:
            log_mel = log_mel_encoder(self.settings.sample_rate)
            self.session.embed(log_mel, folder=folder / LOG_MELS)
        embeddings = self.session.embed(encoder, folder=folder)
        return {"utterances": len(embeddings.utterances)}

    @main_process_only
    def cluster(self, folder: pathlib.Path) -> dict:
        """Makes pseudo-labels from the embeddings (paper, section 2.2)."""
        settings, manifest = self.settings, self.session.manifest
        embeddings = Embeddings.load(self.folder / "embeddings")
        started = time.perf_counter()
        vectors, log_mels = np.array(embeddings.vectors), None
        if settings.log_mel_share:
            first = self.folder.parent / "iter1" / "embeddings" / LOG_MELS
            log_mels = whitened_log_mels(
                Embeddings.load(first), embeddings.utterances
            )
        clusters, points = pseudo_speakers(
            vectors,
            settings.cluster,
            backend=settings.cluster_backend,
            log_mels=log_mels,
            share=settings.log_mel_share,
            twice=settings.cluster_twice,
        )
        labels = without_small(clusters.labels, settings.min_cluster_size)
        if self.given is not None:
            rows = manifest.rows(embeddings.utterances)
            labels = seeded(points, labels, self.given.of(rows))
        # Centroids of the embeddings without back-end, on which the classifier
        # works.
        means, _ = means_of(vectors, labels)
        with atomic_write(folder / CENTROIDS, "wb") as out:
            np.save(out, normalised(means.numpy()))
        kept = np.flatnonzero(labels >= 0)
        names = Strings(embeddings.utterances[row] for row in kept)
        labels = labels[kept]
        write_labels(folder / LABELS, names, labels)
        n_clusters = len(means)
        facts = {
            "n_clusters": n_clusters,
            "seed": settings.seed,
            "encoder": checksum(self.source),
            "inertia": [float(value) for value in clusters.inertia],
            "points_used": int(clusters.points_used),
        }
        if self.given is not None:  # names of the first labels
            facts["speakers"] = [*self.given.speakers]
            # Given labels are never held out.
            rows = self.given.rows
            facts["labelled"] = [manifest.ids[row] for row in rows]
        write_json(folder / "labels.json", facts)
        seconds = time.perf_counter() - started
        self.log(
            phase="clusters",
            n_clusters=n_clusters,
            agreement=self._agreement(),
            seconds=seconds,
            labelled_share=len(labels) / len(vectors),
            **cluster_sizes(labels, n_clusters),
            **self.session.observer.clusters(manifest.rows(names), labels),
        )
        return {"n_clusters": n_clusters}

    def _agreement(self):
        """Returns the AMI of this round's and the previous round's labels.

        None in the first round. When the AMI no longer grows, further rounds
        train on the same labels.
        """
        if self.number == 1:
            return None
        current, before = self.labels, self._labels_of(self.number - 1)
        both = (current >= 0) & (before >= 0)
        return ami(before[both], current[both])

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """The pseudo-labels by row of the manifest, int64, -1 for none."""
        return self._labels_of(self.number)

    def _labels_of(self, number):
        run, manifest = self.session.run, self.session.manifest
        return round_labels(run.folder, number, manifest)

    @property
    def course(self) -> dict[str, int]:
        """Epochs of each phase; all share one learning-rate schedule."""
        phases = ["classifier", "gated"]
        if self.is_last and self.settings.large_margin_epochs:
            phases.append("large_margin")
        return {
            name: getattr(self.settings, f"{name}_epochs") for name in phases
        }

    @property
    def start_of_encoder(self) -> pathlib.Path:
        """The initial weights of the round's encoder."""
        if self.settings.encoder_init == "previous" and self.number > 1:
            return self.source
        if self.settings.new_first_encoder is None:
            return self.first
        return self.session.run.folder / START

    def start(self) -> tuple[Encoder, torch.nn.Module]:
        """Makes an encoder and a classifier with their initial weights.

        The yaml's `encoder_init` and `classifier_init` choose the weights. A
        wide encoder begins at random, because no weights fit.
        """
        encoder, classifier = self._new_modules()
        if not self.is_wide:
            load_weights(encoder.network, self.start_of_encoder)
        if self.settings.classifier_init == "centroids":
            centroids = np.load(self.folder / "labels" / CENTROIDS)
            start_from(classifier, torch.from_numpy(centroids))
        return encoder, classifier

    def load(self, phase: str) -> tuple[Encoder, torch.nn.Module]:
        """Loads the encoder and the classifier that a phase saved."""
        encoder, classifier = self._new_modules()
        load_weights(encoder.network, self.folder / phase / ENCODER)
        load_weights(classifier, self.folder / phase / CLASSIFIER)
        return encoder, classifier

    def _new_modules(self):
        """Makes an encoder and a classifier, whose weights the caller sets."""
        classifier = self.settings.new_classifier(out_neurons=self.n_clusters)
        return made_to_train(self.settings, self.new_encoder), classifier

    @property
    def n_clusters(self) -> int:
        """Number of pseudo-speakers of the round."""
        return self.session.run.done[f"{self.name}/labels"]["n_clusters"]

    def primed_gate(self) -> torch.nn.Module:
        """Prepares the gate for the gated phase.

        The gate gets the losses of the classifier's last epoch, so that it is
        selective from the first step on.
        """
        gate = self.settings.gate
        gate.start_iteration(self.number)
        # Only that epoch's losses, because losses fall from epoch to epoch:
        # those of several epochs would separate into early and late, not right
        # and wrong.
        gate.end_epoch(load_arrays(self.folder / "classifier" / GATE)["losses"])
        return gate

    def selected_rows(self) -> np.ndarray:
        """Returns the rows that were selected at their last visit, sorted."""
        return load_arrays(self.folder / "gated" / GATE)["passed"]

    def fit(
        self,
        folder: pathlib.Path,
        encoder: Encoder,
        classifier: torch.nn.Module,
        gate: torch.nn.Module,
        aam: torch.nn.Module | None = None,
        **options: Any,
    ) -> None:
        """Trains a phase, saves its weights in `folder` and scores it.

        The folder's name is the phase's name in the metrics. The yaml has the
        epochs of `classifier`, `gated` and `large_margin`, and the change of
        labels in `gated`. A phase of another name needs `epochs`. The `gate`
        selects utterances by their losses. `aam` is the loss, by default the
        yaml's. Further options are those of `training.fit.fit`.
        """
        session, settings, labels = self.session, self.settings, self.labels
        observer = session.observer
        modules = stage2_modules(settings, encoder, classifier)
        modules["gate"] = gate
        if aam is not None:
            modules["aam"] = aam
        if settings.anchor:
            start = read_tensors(self.start_of_encoder)
            modules["anchor"] = new_anchor(settings, encoder.network, start)
        if self.given is not None:
            is_given = torch.from_numpy(self.given.by_row >= 0)
            modules["given"] = GivenRows(is_given)
        brain_class, is_gated = LossGatedBrain, folder.name == "gated"
        if is_gated and settings.correct_labels:
            n_utterances = len(session.manifest)
            modules["correction"] = settings.correct_labels(n_utterances)
        if is_gated and settings.relabel:
            brain_class = RelabellingBrain
            # Held-out utterances are never relabelled, and must not keep a
            # pseudo-speaker alive.
            trained = np.full_like(labels, -1)
            trained[session.train_rows] = labels[session.train_rows]
            modules["correction"] = settings.relabel(
                *(encoder, classifier, torch.from_numpy(trained)),
                n_labels=self.n_clusters,
            )

        def remark(brain):
            """Returns figures of true labels for the record; {} without any."""
            last, judged = brain.tally.last, brain.judged_labels(labels)
            return observer.epoch_losses(judged, last["rows"], last["losses"])

        brain = fit(
            session,
            brain_class,
            modules,
            folder,
            labels=labels,
            remark=remark,
            stage=2,
            iteration=self.number,
            phase=folder.name,
            **{**part_of(self.course, folder.name), **options},
        )
        save_weights(encoder.network, folder / ENCODER)
        save_weights(classifier, folder / CLASSIFIER)
        figures = session.score(encoder, folder / SCORES, folder / BACKEND)
        if last := brain.tally.last:
            save_arrays(folder / GATE, **last)
            selected, corrected = last["selected"], last["corrected"]
            figures["selected_share"] = float(np.mean(selected))
            figures["corrected_share"] = float(np.mean(corrected >= 0))
            judged = brain.judged_labels(labels), last["rows"]
            figures.update(observer.selection(*judged, selected, corrected))
        self.log(phase=f"after {folder.name}", **figures)


def stage2_modules(
    settings: Stage2Settings,
    encoder: Encoder,
    classifier: torch.nn.Module,
) -> dict[str, torch.nn.Module]:
    """Makes the modules that train an encoder on all pseudo-labels."""
    return {
        "encoder": encoder,
        "classifier": classifier,
        "aam": settings.aam,
        "gate": settings.no_gate,
    }


def start_from(classifier: torch.nn.Module, centroids: torch.Tensor) -> None:
    """Sets a classifier's weights to the clusters' centroids (K, D)."""
    if hasattr(classifier, "start_from"):
        classifier.start_from(centroids)
        return
    with torch.no_grad():
        classifier.weight.copy_(centroids)
