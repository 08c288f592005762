"""Tables of `paper.py` that compare encoders.

Encoders are compared by the same back-ends and the same clusterings. The tables
give the choice that is made without labels beside the best choice.
"""

import functools
import pathlib

import numpy as np
import speechbrain as sb
import torch
from experiments import CEILING, WITHOUT

from lgl_plugin.clustering.kmeans import FaissKMeans
from lgl_plugin.clustering.number import FIRST_STEP
from lgl_plugin.clustering.two_step import TwoStepKMeans
from lgl_plugin.clustering.vectors import joined, normalised
from lgl_plugin.clustering.ward import ward
from lgl_plugin.dataio.trials import read_trials, trial_audio
from lgl_plugin.evaluation.pseudo_labels import clustering_report
from lgl_plugin.evaluation.verification import (
    as_norm,
    cosine_scores,
    figures_of,
)
from lgl_plugin.inference.backends import Centring, Identity, Whitening
from lgl_plugin.inference.export import read_trained_step
from lgl_plugin.inference.log_mel_baseline import (
    log_mel_encoder,
    log_mel_whitening,
)
from lgl_plugin.nnet.features import Waveform
from lgl_plugin.runs.metrics_log import (
    LOG_MEL_STATISTICS,
    TRUE_LABELS,
    mean_and_range,
)
from lgl_plugin.runs.pretrained import build_encoder
from lgl_plugin.runs.run import encoder_steps
from lgl_plugin.runs.settings import read_preset
from lgl_plugin.runs.state import read_state
from lgl_plugin.training.clusters import pseudo_speakers
from lgl_plugin.training.session import sample_rows
from lgl_plugin.utils.tables import markdown_table

UNTRAINED = "untrained"
# The back-end that a run uses by default.
CHOSEN = "whitened, 10"
BACKENDS = {
    "cosine": Identity,
    "centred": Centring,
    **{
        f"whitened, {shrinkage:g}": functools.partial(Whitening, shrinkage)
        for shrinkage in (0.01, 0.1, 0.3, 1, 3, 10, 30)
    },
}
JOINED = "with log-mel statistics"
TWICE = "the same, behind PLDA on these clusters by Ward"


def study(experiment, options):
    """Stages, baseline and ceiling: EER and minDCF by the same back-ends."""
    experiment.train([WITHOUT, CEILING])
    last = {"stage": 2, "iteration": experiment.settings["n_iterations"]}
    positives = {"phase": "after ssps"}
    phases = {
        LOG_MEL_STATISTICS: ("base", {"stage": 0, "phase": LOG_MEL_STATISTICS}),
        UNTRAINED: ("base", {"stage": 0, "phase": UNTRAINED}),
        "Stage I": ("base", {"stage": 1, "epoch": None}),
        **(
            {"with positives of other utterances": ("base", positives)}
            if experiment.stage1_step == "ssps"
            else {}
        ),
        "after the classifier": ("base", {"phase": "after classifier", **last}),
        "without the gate": (WITHOUT.name, {"phase": "after gated", **last}),
        "with the gate": ("base", {"phase": "after gated", **last}),
        TRUE_LABELS: (CEILING.name, {"phase": f"after {TRUE_LABELS}"}),
    }
    kinds = {"cosine": "", "back-end": "_backend", "AS-norm": "_as_norm"}
    rows = []
    for label, (name, where) in phases.items():
        eers, costs = (
            [
                spread(experiment.values(figure + kind, name, **where), 1, n)
                for kind in kinds.values()
            ]
            for figure, n in (("eer", 1), ("min_dcf_001", 3))
        )
        rows.append([label, *eers, *costs])
    header = [f"EER %, {kind}" for kind in kinds]
    header += [f"minDCF, {kind}" for kind in kinds]
    return markdown_table(["", *header], rows)


def backends(experiment, options):
    """Encoders by back-end, each fitted on unlabelled training embeddings."""
    eers, costs = {}, {}
    for embedder in embedders(experiment, options):
        figures = by_backend(embedder)
        for table, key in ((eers, "eer"), (costs, "min_dcf_001")):
            row = table.setdefault(embedder.name, {})
            for backend, found in figures.items():
                row.setdefault(backend, []).append(found[key])
    tables = []
    for title, table, digits in (("EER %", eers, 1), ("minDCF", costs, 3)):
        names, rows = [*BACKENDS, "AS-norm", JOINED], []
        for encoder, found in table.items():
            means = {name: np.mean(found[name]) for name in BACKENDS}
            best = min(means, key=means.get)
            rows.append(
                [
                    encoder,
                    *(spread(found[name], 1, digits) for name in names),
                    best,
                    f"{means[CHOSEN] - means[best]:.{digits}f}",
                ]
            )
        header = [title, *names, "best", f"'{CHOSEN}' above it"]
        tables.append(markdown_table(header, rows))
    return "\n\n".join(tables)


def by_backend(embedder):
    """Returns the figures of `figures_of` for each back-end.

    AS-norm, and the mean with the baseline's cosine, use the cosine without a
    back-end.
    """
    trials, vectors = embedder.trials, embedder.of_trials
    sample = embedder.sample
    figures = {
        name: figures_of(
            cosine_scores(make().fit(sample)(vectors), trials), trials
        )
        for name, make in BACKENDS.items()
    }
    log_mel = embedder_of(embedder.run, LOG_MEL_STATISTICS, embedder.device)
    others = log_mel_whitening().fit(log_mel.sample)(log_mel.of_trials)
    both = joined(vectors, others, log_mel_share())
    figures[JOINED] = figures_of(cosine_scores(both, trials), trials)
    scores = as_norm(cosine_scores(vectors, trials), trials, vectors, sample)
    return {**figures, "AS-norm": figures_of(scores, trials)}


def log_mel_share():
    """Returns the share of log-mel statistics in the small preset."""
    preset = pathlib.Path(__file__).with_name("hparams") / "small_stage2.yaml"
    return read_preset(preset)["log_mel_share"]


def clusterings(experiment, options):
    """Pseudo-labels by clustering, told the number of speakers or not."""
    cells = {}
    for embedder in embedders(experiment, options):
        for key, report in by_clustering(embedder).items():
            cells.setdefault((embedder.name, *key), []).append(report)
    methods = ("k-means", "Ward", "average linkage")
    header = ["encoder", "points", "K told", "K"]
    header += [f"{of}, {m}" for of in ("AMI", "purity") for m in methods]
    table = []
    for key in dict.fromkeys(key[:-1] for key in cells):
        found = [cells[(*key, method)] for method in methods]
        row = [*key, spread([r["K"] for r in found[0]], 1, 0)]
        for of in ("ami", "purity"):
            row += [spread([r[of] for r in each], 1, 3) for each in found]
        table.append(row)
    choices = []
    for encoder in dict.fromkeys(key[0] for key in cells):
        means = {
            ", ".join(key[1:]): np.mean([report["ami"] for report in found])
            for key, found in cells.items()
            if key[0] == encoder
        }
        best = max(means, key=means.get)
        points = "whitened" if encoder == LOG_MEL_STATISTICS else TWICE
        chosen = cells[encoder, points, "no", "Ward"]
        ratios = [report["K"] / report["speakers"] for report in chosen]
        choices.append(
            [
                encoder,
                spread(ratios, 1, 2),
                spread([report["ami"] for report in chosen], 1, 3),
                f"{means[best]:.3f}",
                best,
            ]
        )
    header_of_choices = ["encoder", "estimate / speakers", "AMI", "best AMI"]
    return (
        markdown_table(header, table)
        + "\n\nAs the small preset clusters, and the best (points, K told, "
        "method):\n\n" + markdown_table([*header_of_choices, "of"], choices)
    )


def by_clustering(embedder):
    """Returns reports by points, "yes" or "no" for K told, and method.

    The reports are those of `clustering_report`, with K and the number of
    speakers. The points after PLDA use first clusters by Ward's method with the
    estimated number.
    """
    speakers = embedder.step.manifest.speakers
    n_speakers = len(np.unique(speakers[speakers >= 0]))
    if not n_speakers:
        raise ValueError(
            f"clusterings needs true speakers, the manifest of {embedder.run} "
            "names none: train with --speaker_folder=True"
        )
    seed = embedder.step.model.settings["seed"]
    first = FaissKMeans(FIRST_STEP, seed=seed)
    raw, reports = embedder.of_corpus, {}
    kinds = {"raw": raw, "whitened": Whitening(1.0).fit_transform(raw)}
    automatic = TwoStepKMeans(first, "auto")
    estimates = {name: automatic(kinds[name]).n_clusters for name in kinds}
    if embedder.name != LOG_MEL_STATISTICS:
        # With log-mel statistics the estimate would count sessions.
        number = estimates["whitened"]
        options = Whitening(1.0), embedder.log_mels, log_mel_share()
        for name, twice in ((JOINED, False), (TWICE, True)):
            cluster = TwoStepKMeans(first, number)
            _, kinds[name] = pseudo_speakers(
                raw, cluster, *options, twice=twice
            )
            estimates[name] = number
    for points, vectors in kinds.items():
        estimate = estimates[points]
        for told, size in (("yes", n_speakers), ("no", estimate)):
            labels = {
                "k-means": FaissKMeans(size, seed=seed)(vectors).labels,
                "Ward": TwoStepKMeans(first, size)(vectors).labels,
                "average linkage": average_to(vectors, size),
            }
            for method, found in labels.items():
                report = clustering_report(speakers, found)
                report |= {"K": size, "speakers": n_speakers}
                reports[points, told, method] = report
    return reports


def average_to(vectors, n_clusters):
    """Clusters by average linkage to a number of clusters."""
    points = torch.from_numpy(normalised(vectors))
    return ward(points, torch.ones(len(points)), average=True).cut(n_clusters)


def embedders(experiment, options):
    """Yields the baseline, an untrained encoder and all encoders of the runs.

    Runs whose encoder takes waveforms get no untrained one.
    """
    runs = [pathlib.Path(run) for run in options.runs]
    if not runs:
        experiment.train([])
        runs = [experiment.run_folder(seed) for seed in experiment.seeds]
    for run in runs:
        steps = encoder_steps(run, read_state(run))
        if not steps:
            raise ValueError(
                f"{run} has trained no encoder yet: finish that run"
            )
        first = embedder_of(run, steps[0], experiment.device)
        features = first.extract.encoder.features
        # Encoders of waveforms are pre-trained: there is no untrained one.
        untrained = () if isinstance(features, Waveform) else (UNTRAINED,)
        for name in (LOG_MEL_STATISTICS, *untrained, *steps):
            yield embedder_of(run, name, experiment.device)


class Embedder:
    """An encoder of a run, ready to embed corpus and trial list.

    `name` is the step of the `run` that saved the encoder, or
    `LOG_MEL_STATISTICS` or `UNTRAINED`. `device` is where the encoder runs.
    """

    def __init__(self, run, name, device):
        self.run, self.name, self.device = run, name, device
        # The step has the encoder's own settings: the last encoder may be
        # wider.
        step = None if name in (LOG_MEL_STATISTICS, UNTRAINED) else name
        self.step = read_trained_step(run, step)
        self.extract = self.step.model.extractor(device)
        if name == LOG_MEL_STATISTICS:
            log_mel = log_mel_encoder(self.step.model.settings["sample_rate"])
            self.extract.encoder = log_mel.to(device).eval()
        elif name == UNTRAINED:
            settings = self.step.model.settings
            sb.utils.seed.seed_everything(settings["seed"])
            encoder = build_encoder(settings)
            self.extract.encoder = encoder.to(device).eval()

    @functools.cached_property
    def trials(self):
        """The run's own trial list."""
        return trials_of(self.step.model.settings, self.run)

    def audio_of(self, trials, folder):
        """Returns a trial list's audio, read by the channel of the run."""
        channel = self.step.model.settings.get("channel")
        return trial_audio(trials, folder, channel, (self.extract.sample_rate,))

    @functools.cached_property
    def of_trials(self):
        """Embeddings of the run's own trial list."""
        folder = self.step.model.settings["trial_folder"]
        return self.extract.embed_all(self.audio_of(self.trials, folder))

    @functools.cached_property
    def of_corpus(self):
        """Embeddings of all utterances that the encoder was trained on."""
        return self.extract.embed_all(self.step.manifest)

    @functools.cached_property
    def sample(self):
        """Embeddings of up to 2,000 of these, for back-ends and as a cohort.

        The run's own figures use the same sample.
        """
        manifest = self.step.manifest
        rows = sample_rows(len(manifest), self.step.model.settings["seed"])
        if "of_corpus" in vars(self) or len(rows) == len(manifest):
            return self.of_corpus[rows]
        return self.extract.embed_all(manifest, rows)

    @property
    def log_mels(self):
        """The corpus's whitened log-mel statistics."""
        base = embedder_of(self.run, LOG_MEL_STATISTICS, self.device)
        return log_mel_whitening().fit_transform(base.of_corpus)

    def eer(self, trials, folder, normed=False):
        """Returns the EER in percent on a trial list; `normed`: by AS-norm."""
        vectors = self.extract.embed_all(self.audio_of(trials, folder))
        scores = cosine_scores(vectors, trials)
        if normed:
            scores = as_norm(scores, trials, vectors, self.sample)
        return figures_of(scores, trials)["eer"]


# Cached, because `clusterings` uses the embedders of `backends`.
embedder_of = functools.lru_cache(maxsize=64)(Embedder)


def trials_of(settings, of_what):
    """Returns the trial list that settings name; ValueError if none."""
    if not settings["verification_file"]:
        raise ValueError(
            f"{of_what}: there is no trial list; set --verification_file and "
            "--trial_folder"
        )
    return read_trials(
        settings["verification_file"],
        settings["trial_folder"],
        settings.get("allow_outside_data_folder", False),
    )


def after(experiment, name, iteration=1, figure="eer", phase="gated"):
    """Returns a figure at a phase's end, one value for each seed."""
    where = {"iteration": iteration, "phase": f"after {phase}"}
    return experiment.values(figure, name, **where)


def spread(values, factor=1, digits=1):
    """Returns mean (lowest to highest); [n of all] if seeds lack a value."""
    kept = [v for v in values if v is not None and np.isfinite(v)]
    text = mean_and_range(factor * np.array(kept), digits)
    if not kept or len(kept) == len(values):
        return text
    return f"{text} [{len(kept)} of {len(values)}]"
