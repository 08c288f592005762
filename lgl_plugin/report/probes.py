"""Loads checkpoints of a run with their training loss, for `lgl landscape`.

The loss is computed on a fixed sample, without augmentation: the same crops of
the same utterances for all checkpoints of a run, and for all runs on the same
manifest.
"""

import copy
import dataclasses
import functools
import pathlib
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch

from lgl_plugin.dataio.audio import BadAudio
from lgl_plugin.dataio.crops import read_crops
from lgl_plugin.dataio.labels import labelled_rows, round_labels
from lgl_plugin.dataio.manifest import held_out, run_manifest
from lgl_plugin.methods.method import embedded
from lgl_plugin.nnet.augment import NoAugmentation
from lgl_plugin.nnet.batch_norm import batch_norms
from lgl_plugin.nnet.encoders import restricted
from lgl_plugin.report.results import PHASES
from lgl_plugin.runs.pretrained import build_encoder, made
from lgl_plugin.runs.run import (
    CENTROIDS,
    GATE,
    encoder_kind,
    round_of,
    stage1_steps,
)
from lgl_plugin.runs.state import read_state, refuse_adaptation
from lgl_plugin.runs.weights import CLASSIFIER, ENCODER, load_weights
from lgl_plugin.training.stage1 import METHOD
from lgl_plugin.training.stage2 import start_from
from lgl_plugin.training.start import given_weights
from lgl_plugin.utils.files import load_arrays

BATCH = 64  # crops that are embedded at once
START, STAGE1 = "start", "stage1"


@dataclasses.dataclass(eq=False)
class Probe:
    """An encoder, the modules of its training loss, and a fixed sample."""

    name: str
    model: torch.nn.ModuleDict  # the encoder, and classifier or method
    crops: torch.Tensor  # (n, samples), or (n, number, samples)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The encoder's weights that were trained."""
        weights = self.model["encoder"].parameters()
        return [weight for weight in weights if weight.requires_grad]

    def use_batch_norm(self, by_batch: bool) -> None:
        """Selects each batch's own statistics, or the running statistics."""
        self.model.eval()
        for part in batch_norms(self.model) if by_batch else ():
            part.train()
            part.momentum = 0.0  # does not update the running statistics


@dataclasses.dataclass(eq=False)
class MethodProbe(Probe):
    """Stage I's encoder and method, on one batch of two crops an utterance."""

    rows: torch.Tensor  # of the manifest, by which a queue identifies crops

    @property
    def counted(self) -> int:
        """The number of utterances that counted: all."""
        return len(self.crops)

    def figures(self) -> torch.Tensor:
        """Returns the method's loss twice: all utterances count."""
        return self._loss().expand(2)

    def chance(self) -> None:
        """Returns None: a method's loss at chance level is not known."""

    def parts(self) -> list[Callable[[], torch.Tensor]]:
        """Returns the loss, with its graph, as the only part."""
        return [self._loss]

    def _loss(self):
        # A copy, because a call would update the method's queues and centres.
        method = copy.deepcopy(self.model["method"])
        with torch.random.fork_rng(devices=[]):  # the same views at each call
            torch.manual_seed(0)
            views, taught = method.views(self.crops, NoAugmentation())
            return method(
                [embedded(self.model["encoder"], group) for group in views],
                method.teach(taught),
                torch.stack([self.rows, self.rows]),
                1.0,
            )[0]


@dataclasses.dataclass(eq=False)
class LabelProbe(Probe):
    """Stage II's encoder and classifier, with their pseudo-labels."""

    aam: torch.nn.Module
    labels: torch.Tensor  # pseudo-labels, int64 (n,)
    # The labels by which an utterance counted in the step's last epoch, int64
    # (n,), -1 where it did not count.
    trained_on: torch.Tensor

    @property
    def counts(self) -> torch.Tensor:
        """A mask of the utterances that counted, bool (n,)."""
        return self.trained_on >= 0

    @property
    def counted(self) -> int:
        """The number of utterances that counted."""
        return int(self.counts.sum())

    def figures(self) -> torch.Tensor:
        """Returns the mean loss of all utterances, and of those that count."""
        cosines = torch.cat([self._cosines(c) for c in self.crops.split(BATCH)])
        every = self.aam(cosines, self.labels).mean()
        counted = self.aam(cosines[self.counts], self.trained_on[self.counts])
        return torch.stack([every, counted.mean()])

    @torch.no_grad()
    def chance(self) -> float:
        """Returns the loss of an embedding orthogonal to all classes."""
        n_classes = self._cosines(self.crops[:2]).shape[1]
        label = self.labels[:1] * 0
        zeros = torch.zeros(1, n_classes, device=label.device)
        return float(self.aam(zeros, label))

    def parts(self) -> list[Callable[[], torch.Tensor]]:
        """Returns functions for parts of the loss of those that count.

        Each computes its part with a graph; the parts sum to the loss.
        """
        return [
            functools.partial(self._part, crops, labels)
            for crops, labels in zip(
                self.crops.split(BATCH), self.trained_on.split(BATCH)
            )
        ]

    def _part(self, crops, labels):
        losses = self.aam(self._cosines(crops), labels.clamp(min=0))
        return losses[labels >= 0].sum() / self.counts.sum()

    def _cosines(self, crops):
        embeddings = self.model["encoder"](crops)
        return self.model["classifier"](embeddings[:, None])[:, 0]


class ProbedRun:
    """A run folder whose steps are probed.

    Raises FileNotFoundError or ValueError if it is not that of a training.
    """

    def __init__(self, folder: pathlib.Path, utterances: int, seed: int):
        self.folder = folder
        refuse_adaptation(folder)
        state = read_state(folder)
        self.all_settings = state["settings"]
        self.done = state["done"]
        stages = [self.all_settings.get(f"stage {n}") for n in (2, 1)]
        if not any(stages):
            raise ValueError(f"{folder} is of no training")
        self.settings = stages[0] or stages[1]
        self.seed = seed
        settings = self.settings
        self.manifest = run_manifest(folder, settings)
        split = settings["held_out_share"], settings["seed"]
        labelled = labelled_rows(folder / "iter1" / "labels", self.manifest)
        rows, _ = held_out(len(self.manifest), *split, labelled)
        self.order = np.random.default_rng(seed).permutation(rows)
        self.rows = np.sort(self.order[:utterances])

    def names(self) -> list[str]:
        """Lists the steps that can be probed, such as stage1, iter1/gated."""
        path = self.folder / STAGE1 / METHOD
        probed = [STAGE1] * (STAGE1 in self.done and path.exists())
        for number in range(1, self.settings.get("n_iterations", 0) + 1):
            if f"iter{number}/labels" not in self.done:
                break
            names = [f"iter{number}/{phase}" for phase in PHASES]
            # A fine-tuning for which the gate left too few utterances is done
            # without an encoder.
            names = [
                name
                for name in names
                if name in self.done and (self.folder / name / ENCODER).exists()
            ]
            # A start can be probed only if the round trains the kind of encoder
            # that was clustered: the classifier is made of the cluster means.
            wide = encoder_kind(self.settings, number) != "new_encoder"
            other_kind = wide or (
                number == 1 and self.settings.get("new_first_encoder")
            )
            has_start = not other_kind and self._source(number).exists()
            probed += [f"iter{number}/{START}"] * has_start + names
        return probed

    def probes(
        self, names: list[str], device: str, by_batch: bool
    ) -> Iterator[Probe]:
        """Loads and yields probes, one at a time."""
        if STAGE1 in names:
            probe = MethodProbe(STAGE1, *self._stage1(device))
            probe.use_batch_norm(by_batch)
            yield probe
        names = [name for name in names if name != STAGE1]
        if names:
            crops = self._crops(self.settings)[:, 0].to(device)
        for name in names:
            number, phase = round_of(name), name.split("/")[1]
            labels = round_labels(self.folder, number, self.manifest)
            kept = torch.from_numpy(labels[self.rows] >= 0)
            trained_on = self._trained_on(name, labels)[self.rows]
            aam = "large_margin" if phase == "large_margin" else "aam"
            probe = LabelProbe(
                name,
                self._model(name, number, phase).to(device),
                crops[kept.to(device)],
                made(self.settings[aam]),
                torch.from_numpy(labels[self.rows])[kept].to(device),
                torch.from_numpy(trained_on)[kept].to(device),
            )
            if not probe.counts.any():  # else the losses would be NaN
                raise ValueError(
                    f"{self.folder}: no utterance that counted in the last "
                    f"epoch of {name} can be read: give more --utterances"
                )
            probe.use_batch_norm(by_batch)
            yield probe

    def check_counts(self, names: list[str]) -> None:
        """Refuses a step in whose last epoch none of the sample counted.

        The loss of those that counted would have no value. ValueError says how
        many utterances to take.
        """
        for name in names:
            if name == STAGE1:
                continue
            labels = round_labels(self.folder, round_of(name), self.manifest)
            counted = (labels >= 0) & (self._trained_on(name, labels) >= 0)
            if counted[self.rows].any():
                continue
            advice = f"leave {name} out by --only"
            if places := np.flatnonzero(counted[self.order]).tolist():
                advice += f", or give --utterances={places[0] + 1} or more"
            raise ValueError(
                f"{self.folder}: of {len(self.rows)} utterances none counted "
                f"in the last epoch of {name}: {advice}"
            )

    def _stage1(self, device):
        """Returns Stage I's model, two crops of each utterance, and rows."""
        settings = self.all_settings["stage 1"]
        encoder = build_encoder(settings)
        size = settings["embedding_size"]
        method = made(settings["method"])(encoder, size, len(self.manifest))
        load_weights(encoder.network, self.folder / STAGE1 / ENCODER)
        load_weights(method, self.folder / STAGE1 / METHOD)
        both = {"encoder": encoder, "method": method}
        model = torch.nn.ModuleDict(both).to(device)
        crops = self._crops(settings, 2).to(device)
        return model, crops, torch.from_numpy(self.rows).to(device)

    def _crops(self, settings, number=1):
        """Reads crops of each utterance of the sample, (n, number, samples).

        Bad utterances, which training skipped, are removed from the sample.
        """
        crop, rate = settings["crop_seconds"], settings["sample_rate"]
        crops, bad = {}, []
        for row in self.rows.tolist():
            name = self.manifest.ids[row]
            rng = random.Random(f"{self.seed} {name}")
            try:
                crops[row] = read_crops(
                    **self.manifest[row],
                    crop=crop,
                    n_crops=number,
                    sample_rate=rate,
                    rng=rng,
                )
            except BadAudio as error:
                bad.append(f"{name} {error}")
        if bad:
            said = f"{len(bad)} of {len(self.rows)} utterances cannot be read"
            said = f"{self.folder}: {said}; the first: {bad[0]}"
            if not crops:
                raise ValueError(said)
            print(said)
        self.rows = np.array([*crops])
        return torch.stack([*crops.values()])

    def _trained_on(self, name, labels):
        """Returns the labels that utterances were trained on, -1 for none."""
        path = self.folder / name / GATE
        if not path.exists():
            return labels
        last = load_arrays(path)
        counted = np.full(len(labels), -1)
        chosen = last["rows"][last["selected"]]
        counted[chosen] = labels[chosen]
        corrected = last.get("corrected", np.full(len(last["rows"]), -1))
        changed = corrected >= 0
        counted[last["rows"][changed]] = corrected[changed]
        return counted

    def _model(self, name, number, phase):
        """Makes the encoder and the classifier of a probe."""
        kind = encoder_kind(self.settings, number)
        encoder = restricted(
            made(self.settings[kind])(),
            self.settings.get("freeze_batch_statistics", False),
            self.settings.get("trained_weights"),
        )
        classifier = made(self.settings["new_classifier"])(
            out_neurons=self.done[f"iter{number}/labels"]["n_clusters"]
        )
        folder = self.folder / name
        if phase == START:
            load_weights(encoder.network, self._source(number))
            means = self.folder / f"iter{number}" / "labels" / CENTROIDS
            start_from(classifier, torch.from_numpy(np.load(means)))
        else:
            load_weights(encoder.network, folder / ENCODER)
            load_weights(classifier, folder / CLASSIFIER)
        both = {"encoder": encoder, "classifier": classifier}
        return torch.nn.ModuleDict(both)

    def _source(self, number):
        """Returns the weights whose embeddings a round's labels are of."""
        if number > 1:
            return self.folder / f"iter{number - 1}" / "gated" / ENCODER
        pretrained = given_weights(self.settings.get("pretrained_encoder"))
        last = self.folder / stage1_steps(self.all_settings)[-1]
        return pretrained or last / ENCODER
