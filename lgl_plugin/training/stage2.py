"""The two stages, step by step; each step runs once, see `run_folder`."""

import pathlib
import time

import numpy as np
import torch
from speechbrain.utils.distributed import main_process_only
from speechbrain.utils.logger import get_logger

from lgl_plugin.dataio.labels import read_labels, write_labels
from lgl_plugin.evaluation import pseudo_labels
from lgl_plugin.inference.backends import whiten
from lgl_plugin.inference.export import export
from lgl_plugin.inference.store import Embeddings
from lgl_plugin.methods.simclr import SimCLRBrain
from lgl_plugin.metrics import agreement
from lgl_plugin.nnet.encoders import LogMelStatistics
from lgl_plugin.report.build import write_report
from lgl_plugin.runs.state import check_artefact
from lgl_plugin.runs.weights import load_weights, save_weights
from lgl_plugin.training.health import cluster_sizes
from lgl_plugin.training.loss_gated import LossGatedBrain
from lgl_plugin.training.session import Training
from lgl_plugin.utils.files import (
    atomic_write,
    checksum,
    save_arrays,
    write_json,
)
from lgl_plugin.utils.signals import stop

logger = get_logger(__name__)

ENCODER = "embedding_model.ckpt"
CLASSIFIER = "classifier.ckpt"
MEMORY = "losses.ckpt"
SCORES = "scores.npz"
GATE = "gate.npz"


@stop.on_signals()
def train_stage1(hparams, run_opts, settings):
    """Stage I: SimCLR with augmentation adversarial training.

    Leaves the encoder in `<output_folder>/stage1/embedding_model.ckpt`.

    Arguments
    ---------
    hparams : dict
        `hparams/stage1.yaml`, loaded.
    run_opts : dict
        SpeechBrain's run options.
    settings : str
        The yaml's text after overrides.
    """
    training = Training(hparams, run_opts, settings)
    run = training.run

    def baselines(folder):
        """What any training must beat: the floor and the untrained encoder."""
        training.seed(0)
        if training.trials is None:
            return
        statistics = LogMelStatistics()
        extract = training.extractor(statistics)
        reference, bad = extract(training.manifest, training.rows)
        training.bad_files.add(bad)
        floor = whiten(reference.vectors, training.embed_trials(statistics))
        figures = training.score(floor, folder / "floor.npz")
        run.log(stage=0, phase="log-mel statistics", **figures)
        encoder = hparams["new_encoder"]()
        figures = training.verify(encoder, folder / "untrained.npz")
        run.log(stage=0, phase="untrained", **figures)

    def stage1(folder):
        training.seed(1)
        encoder = hparams["new_encoder"]()
        modules = {
            "embedding_model": encoder,
            "contrastive": hparams["contrastive"],
            "discriminator": hparams["discriminator"],
        }
        training.fit(
            SimCLRBrain,
            modules,
            folder,
            hparams["number_of_epochs"],
            stage=1,
            phase="simclr",
        )
        save_weights(encoder, folder / ENCODER)
        figures = training.verify(encoder, folder / SCORES)
        run.log(stage=1, phase="after simclr", **figures)

    run.step("baselines", baselines)
    run.step("stage1", stage1)
    hand_over(training, "stage1", run.checksum("stage1"))


@stop.on_signals()
def train_stage2(hparams, run_opts, settings):
    """Stage II: extract, cluster, train, train loss-gated; again.

    Arguments
    ---------
    hparams : dict
        `hparams/stage2.yaml`, loaded.
    run_opts : dict
        SpeechBrain's run options.
    settings : str
        The yaml's text after overrides.

    Raises
    ------
    FileNotFoundError
        If there is no encoder to start from.
    ValueError
        If that encoder has another shape, or there are fewer utterances than
        clusters.
    """
    training = Training(hparams, run_opts, settings)
    debug = run_opts.get("debug", False)
    first = find_encoder(hparams, training.run.folder, debug)
    if hparams["pretrained_encoder"]:
        training.run.given("pretrained_encoder", first)
    hparams["cluster"].check(len(training.rows))
    for iteration in range(1, hparams["n_iterations"] + 1):
        result = Iteration(training, iteration, first).run()
        hand_over(training, f"iter{iteration}", result)


class Iteration:
    """One round of Stage II.

    Arguments
    ---------
    training : lgl_plugin.training.session.Training
        The run.
    number : int
        From 1.
    first : pathlib.Path
        Weights of the encoder that Stage II starts from.
    """

    def __init__(self, training, number, first):
        self.training = training
        self.hparams = training.hparams
        self.number = number
        self.name = f"iter{number}"
        self.folder = training.run.folder / self.name
        self.first = first
        before = training.run.folder / f"iter{number - 1}" / "gated" / ENCODER
        self.source = first if number == 1 else before
        last = number == self.hparams["n_iterations"]
        self.wide = last and self.hparams["new_last_encoder"] is not None

    def run(self):
        """Does the steps that are not done yet.

        Returns
        -------
        str
            A checksum of what the last one left.
        """
        steps = {
            "embeddings": self.extract,
            "labels": self.cluster,
            "classifier": self.train_classifier,
            "gated": self.train_gated,
        }
        last = self.number == self.hparams["n_iterations"]
        if last and self.hparams["large_margin_epochs"]:
            steps["large_margin"] = self.train_large_margin
        run = self.training.run
        made_from = checksum(self.source)
        for index, (step, work) in enumerate(steps.items()):
            self.training.seed(10 * self.number + index)
            run.step(f"{self.name}/{step}", work, made_from)
            made_from = run.checksum(f"{self.name}/{step}")
        return made_from

    def log(self, **record):
        """Adds a record to the run's metrics."""
        self.training.log(stage=2, iteration=self.number, **record)

    def extract(self, folder):
        """Embeds all utterances, those held out too."""
        # The encoder before this round is never the wide one.
        encoder = load_weights(self.hparams["new_encoder"](), self.source)
        extract = self.training.extractor(encoder)
        training = self.training
        found, bad = extract(training.manifest, training.rows, folder)
        training.bad_files.add(bad)
        return {"utterances": len(found.utterances)}

    @main_process_only
    def cluster(self, folder):
        """Makes pseudo-labels of the embeddings (paper, section 2.2)."""
        found = Embeddings.load(self.folder / "embeddings")
        started = time.perf_counter()
        clusters = self.hparams["cluster"](np.array(found.vectors))
        with atomic_write(folder / "centroids.npy", "wb") as out:
            np.save(out, clusters.centroids)
        write_labels(folder / "labels.csv", found.utterances, clusters.labels)
        facts = {
            "n_clusters": int(clusters.n_clusters),
            "seed": self.hparams["seed"],
            "encoder": checksum(self.source),
            "inertia": [float(value) for value in clusters.inertia],
            "points_used": int(clusters.points_used),
        }
        write_json(folder / "labels.json", facts)
        seconds = time.perf_counter() - started
        rows = self.training.manifest.rows(found.utterances)
        self.log(
            phase="clusters",
            n_clusters=facts["n_clusters"],
            agreement=self.agreement(),
            seconds=seconds,
            **cluster_sizes(clusters.labels, facts["n_clusters"]),
            **self.compare(rows, clusters.labels),
        )
        return {"n_clusters": facts["n_clusters"]}

    def train_classifier(self, folder):
        """Trains encoder and a new classifier on all pseudo-labels."""
        encoder, classifier = self.new_modules()
        if not self.wide:
            warm = self.hparams["encoder_init"] == "previous"
            load_weights(encoder, self.source if warm else self.first)
        if self.hparams["classifier_init"] == "centroids":
            centroids = np.load(self.folder / "labels" / "centroids.npy")
            start_from(classifier, torch.from_numpy(centroids))
        self.fit(
            folder,
            encoder,
            classifier,
            {
                "aam": self.hparams["aam"],
                "gate": self.hparams["no_gate"],
                "memory": self.new_memory(),
            },
            epochs=self.hparams["classifier_epochs"],
        )

    def train_gated(self, folder):
        """Goes on with both through the gate (paper, section 3)."""
        before = self.folder / "classifier"
        encoder, classifier = self.load_modules(before)
        gate = self.hparams["gate"]
        gate.start_iteration(self.number)
        # Known losses make the gate selective from its first step on.
        memory = load_weights(self.new_memory(), before / MEMORY)
        gate.end_epoch(memory.losses[~memory.losses.isnan()])
        modules = {"aam": self.hparams["aam"], "gate": gate, "memory": memory}
        if self.hparams["correct_labels"] is not None:
            modules["correction"] = self.hparams["correct_labels"]
        self.fit(
            folder,
            encoder,
            classifier,
            modules,
            epochs=self.hparams["gated_epochs"],
            epochs_before=self.hparams["classifier_epochs"],
        )

    def train_large_margin(self, folder):
        """Fine-tunes on what the gate let through, with a larger margin.

        Large-margin fine-tuning (Thienpondt et al. 2021): longer crops bear
        it. The gate's threshold would not; what it selected last stays.
        """
        before = self.folder / "gated"
        encoder, classifier = self.load_modules(before)
        with np.load(before / GATE) as gate:
            rows = np.sort(gate["rows"][gate["selected"]])
        batch_size = self.training.batch_size
        if len(rows) < batch_size:  # the round ends with the gated encoder
            self.log(
                phase=folder.name, utterances=len(rows), batch_size=batch_size
            )
            return
        self.fit(
            folder,
            encoder,
            classifier,
            {
                "aam": self.hparams["large_margin"],
                "gate": self.hparams["no_gate"],
                "memory": self.new_memory(),
            },
            rows=rows,
            crop_seconds=self.hparams["large_margin_crop_seconds"],
            epochs=self.hparams["large_margin_epochs"],
            epochs_before=self.hparams["classifier_epochs"]
            + self.hparams["gated_epochs"],
        )

    def new_memory(self):
        """A memory of losses with nothing in it."""
        return self.hparams["new_memory"](len(self.training.manifest))

    def new_modules(self):
        """An encoder and a classifier with weights yet to be given."""
        kind = "new_last_encoder" if self.wide else "new_encoder"
        n_clusters = self.training.run.done[f"{self.name}/labels"]["n_clusters"]
        classifier = self.hparams["new_classifier"](out_neurons=n_clusters)
        return self.hparams[kind](), classifier

    def load_modules(self, folder):
        """An encoder and a classifier with the weights that a phase left."""
        encoder, classifier = self.new_modules()
        load_weights(encoder, folder / ENCODER)
        load_weights(classifier, folder / CLASSIFIER)
        return encoder, classifier

    def fit(self, folder, encoder, classifier, modules, **options):
        """Trains a phase, leaves its weights in `folder`, scores it."""
        labels = self.read_labels()
        brain = self.training.fit(
            LossGatedBrain,
            {"embedding_model": encoder, "classifier": classifier, **modules},
            folder,
            labels=labels,
            remark=self.loss_by_reliability(labels),
            stage=2,
            iteration=self.number,
            phase=folder.name,
            **options,
        )
        save_weights(encoder, folder / ENCODER)
        save_weights(classifier, folder / CLASSIFIER)
        save_weights(modules["memory"], folder / MEMORY)
        figures = self.training.verify(encoder, folder / SCORES)
        if brain.losses is not None:
            save_arrays(
                folder / GATE,
                rows=brain.rows,
                losses=brain.losses,
                selected=brain.selected,
                corrected=brain.corrected,
                tau=float(brain.tau),
            )
            figures["selected_share"] = float(np.mean(brain.selected))
            figures["corrected_share"] = float(np.mean(brain.corrected >= 0))
            figures.update(self.judge(labels, brain))
        self.log(phase=f"after {folder.name}", **figures)

    def judge(self, labels, brain):
        """What true labels say of the gate and of corrected labels."""
        report = self.compare(brain.rows, labels[brain.rows], brain.selected)
        keys = ("nmi_selected", "ami_selected", "gate_precision", "gate_recall")
        found = {key: report[key] for key in keys if key in report}
        true = self.training.manifest.speakers
        changed = (brain.corrected >= 0) & (true[brain.rows] >= 0)
        if changed.any():
            known = labels >= 0
            speakers = pseudo_labels.hungarian_mapping(
                true[known], labels[known]
            )
            said = [speakers.get(n, -1) for n in brain.corrected[changed]]
            found["correction_precision"] = float(
                np.mean(said == true[brain.rows[changed]])
            )
        return found

    def loss_by_reliability(self, labels):
        """The mean losses of both kinds of labels, for each epoch's record.

        Paper, section 3 and figure 2. Nothing that trains reads it.
        """
        true, known = self.training.manifest.speakers, labels >= 0
        if not (true[known] >= 0).any():
            return None
        trusted = np.zeros(len(labels), bool)
        trusted[known] = pseudo_labels.reliable(true[known], labels[known])

        def losses(brain):
            groups = trusted[brain.rows], ~trusted[brain.rows]
            means = [
                float(np.mean(brain.losses[group])) if group.any() else None
                for group in groups
            ]
            return dict(zip(("loss_reliable", "loss_unreliable"), means))

        return losses

    def agreement(self):
        """Adjusted mutual information with the labels of the round before.

        It needs no true labels: once it no longer grows, further rounds train
        on what is known already.
        """
        if self.number == 1:
            return None
        now, before = self.read_labels(), self.read_labels(self.number - 1)
        both = (now >= 0) & (before >= 0)
        return agreement.ami(before[both], now[both])

    def read_labels(self, number=None):
        """A round's pseudo-labels by row of the manifest, -1 for none."""
        manifest = self.training.manifest
        folder = self.training.run.folder / f"iter{number or self.number}"
        names, pseudo = read_labels(folder / "labels" / "labels.csv")
        labels = np.full(len(manifest), -1)
        labels[manifest.rows(names)] = pseudo
        return labels

    def compare(self, rows, pseudo, selected=None):
        """How pseudo-labels agree with true ones, if the manifest has them.

        Logged after the fact; nothing that trains reads it.
        """
        true = self.training.manifest.speakers[rows]
        if not (true >= 0).any():
            return {}
        return pseudo_labels.clustering_report(true, pseudo, selected)


def hand_over(training, name, made_from):
    """Exports a stage's or round's encoder and writes the run's page.

    Neither may end a training that went well. An export that failed is tried
    again at the next start.
    """
    run = training.run

    def export_latest(folder):
        try:
            return export(run.folder, name, folder, device=training.device)
        except Exception as error:
            logger.warning(
                "No export; try `lgl export %s %s`",
                run.folder,
                name,
                exc_info=True,
            )
            return {"failed": f"{type(error).__name__}: {error}"}

    run.step(f"export/{name}", export_latest, made_from)
    write_page(run.folder)


@main_process_only
def write_page(folder):
    """Writes the run's page.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "metrics.jsonl").write_text(
    ...     '{"stage": 0, "phase": "untrained", "eer": 38.0}'
    ... )
    >>> write_page(folder)
    >>> (folder / "report" / "index.html").exists()
    True
    """
    try:
        logger.info("The run's page: %s", write_report([folder]))
    except Exception:
        logger.warning("The run's page was not written", exc_info=True)


def start_from(classifier, centroids):
    """Gives a classifier the clusters' centroids (K, D) as its weights.

    Example
    -------
    >>> from speechbrain.lobes.models.ECAPA_TDNN import Classifier
    >>> classifier = Classifier(input_size=2, out_neurons=3)
    >>> start_from(classifier, torch.tensor([[1.0, 0], [0, 1], [-1, 0]]))
    >>> cosines = classifier(torch.tensor([[[0.0, 5.0]]]))
    >>> cosines.argmax().item()
    1
    """
    if hasattr(classifier, "start_from"):
        classifier.start_from(centroids)
        return
    with torch.no_grad():
        classifier.weight.copy_(centroids)


def find_encoder(hparams, folder, debug=False):
    """The weights from which Stage II starts, checked against the yaml.

    In debug mode, which tries out a setup, an untrained encoder will do.

    Raises
    ------
    FileNotFoundError
        If there is none; says which command makes it.
    ValueError
        If they do not fit the yaml's encoder, or were damaged since the run
        that made them.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> save_weights(torch.nn.Linear(2, 3), folder / ENCODER)
    >>> hparams = {
    ...     "new_encoder": lambda: torch.nn.Linear(2, 3),
    ...     "pretrained_encoder": folder,
    ... }
    >>> find_encoder(hparams, folder / "run").name
    'embedding_model.ckpt'
    """
    given = hparams["pretrained_encoder"]
    path = pathlib.Path(given) if given else folder / "stage1" / ENCODER
    if path.is_dir():
        path = path / ENCODER
    if not path.exists() and debug:
        logger.warning(
            "--debug: no encoder at %s, an untrained one it is", path
        )
        save_weights(hparams["new_encoder"](), folder / "untrained.ckpt")
        return folder / "untrained.ckpt"
    if not path.exists():
        key = f"pretrained_encoder: {given}" if given else "Stage II"
        raise FileNotFoundError(
            f"{key}: there is no encoder at {path}. Train one with "
            f"`python train_lgl.py {hparams['stage1_yaml']} "
            f"--output_folder={hparams['output_folder']} "
            f"--data_folder={hparams['data_folder']}`, or set "
            "pretrained_encoder to a SpeechBrain ECAPA-TDNN checkpoint."
        )
    check_artefact(path)
    load_weights(hparams["new_encoder"](), path)
    return path
