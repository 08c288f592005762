#!/usr/bin/env python3
"""Studies why self-supervised speech models help speaker recognition.

> python pretraining_study.py hparams/small_pretrain.yaml \
    --data_folder=/path/to/so762_sessions --further=/path/to/an4_sessions \
    --output_folder=results/pretraining

The claims of "Why does Self-Supervised Learning for Speech Recognition Benefit
Speaker Recognition?" (Chen et al. 2022), as far as minutes of a CPU core can
show them. Models are pre-trained by three objectives, at two sizes, on two
amounts of speech, and by further quantisers. Each model is frozen below the
same back-end, which is trained on true labels, as in the paper, and by Stage II
without labels. The back-end's speech and the trials are in the data folder. No
test speaker is in any training. Any option of pretrain.py may follow. Finished
parts are not repeated; study.md has the tables of the finished parts.
"""

import dataclasses
import itertools
import json
import pathlib
import random

from lgl_plugin.utils.threads import spin_briefly

spin_briefly()  # before torch: OpenMP reads the setting on loading

import numpy as np
import torch
from experiments import make_parser
from frozen import Head, first_labels, label_free, statistics, train_head
from pretrain import MODEL, RECORD, pretrain, read_settings
from study import spread
from transformers import Wav2Vec2BertModel

from lgl_plugin.dataio.audio import probe, read_audio
from lgl_plugin.dataio.crops import read_crops
from lgl_plugin.dataio.folder import find_audio
from lgl_plugin.dataio.trials import read_trials
from lgl_plugin.evaluation.verification import cosine_scores, figures_of
from lgl_plugin.inference.backends import Whitening
from lgl_plugin.inference.log_mel_frames import LogMels, write_log_mels
from lgl_plugin.metrics.agreement import ami
from lgl_plugin.nnet.augment import Augmenter
from lgl_plugin.runs.arguments import as_typed, key_of
from lgl_plugin.runs.metrics_log import LOG_MEL_STATISTICS
from lgl_plugin.runs.plain import dump_settings
from lgl_plugin.utils.files import atomic_write, write_json
from lgl_plugin.utils.progress import tqdm
from lgl_plugin.utils.tables import markdown_table

SIZES = {"small": {}, "large": {"hidden_size": 128, "n_layers": 4}}
PART, MIXING = 0.0625, 0.2  # shares of speech, of utterances (as in WavLM)
BACKEND, STUDY = "backend.json", "study.json"
UTTERANCES, SECONDS = 2000, 2.0  # in the back-end's training; of a crop
TITLES = {
    "untrained": "not trained",
    "best_rq": "masked, random projection (BEST-RQ)",
    "hubert": "masked, k-means of cepstra (HuBERT)",
    "kmeans_log_mel": "masked, k-means of log-mel",
    "kmeans_layer": "masked, k-means of HuBERT's layer 1",
    "wav2vec2": "contrastive (wav2vec 2.0)",
}


@dataclasses.dataclass(frozen=True)
class Model:
    """A model of the study, and the options by which pretrain.py makes it."""

    objective: str
    size: str = "small"
    share: float = 1.0
    mixed: bool = False

    @property
    def name(self):
        """Name of the folder."""
        mixed = "-mixed" * self.mixed
        return f"{self.objective}-{self.size}-{self.share:g}{mixed}"

    def options(self, folder):
        """Returns the overrides of the yaml."""
        overrides = {"data_share": self.share, **SIZES[self.size]}
        if self.objective != "untrained":
            overrides["objective"] = self.objective
        if self.mixed:
            overrides["mixing_share"] = MIXING
        if self.objective == "kmeans_layer":
            teacher = folder / Model("hubert").name / MODEL
            overrides["teacher"] = str(teacher)
        return overrides


OBJECTIVES = ("hubert", "wav2vec2", "best_rq")
MODELS = (  # the most informative first
    Model("untrained"),
    *(Model(objective) for objective in OBJECTIVES),
    *(Model(objective, "large") for objective in OBJECTIVES),
    Model("untrained", "large"),
    *(Model(objective, share=PART) for objective in OBJECTIVES),
    Model("hubert", mixed=True),
    Model("kmeans_log_mel"),
    Model("kmeans_layer"),
    *(Model(objective, "large", PART) for objective in OBJECTIVES),
    Model("hubert", "large", mixed=True),
)


def main():
    """Does the remaining parts of the study, and writes its tables."""
    parser = make_parser(__doc__, seeds="1,2,3")
    parser.add_argument("yaml", help="pretrain.py's")
    parser.add_argument("--data_folder", type=pathlib.Path, required=True)
    parser.add_argument("--further", type=pathlib.Path, nargs="*", default=[])
    parser.add_argument("--output_folder", default="results/pretraining")
    options, overrides = parser.parse_known_args()
    for option in overrides:
        if not (option.startswith("--") and "=" in option):
            parser.error(f"{option}: write options of pretrain.py --name=value")
    folder = pathlib.Path(options.output_folder).absolute()
    seeds = options.seeds
    corpora = [*options.further, options.data_folder]
    trains = [str(one.absolute() / "train") for one in corpora]
    shared = {
        "train_folders": trains,
        "features_folder": str(folder / "features"),
    }
    # A mistyped option shows here, not after the first runs.
    own = {**shared, "output_folder": str(folder)}
    taken = {*own}.union(*(model.options(folder) for model in MODELS))
    for option in overrides:
        if key_of(option) in taken:
            parser.error(f"{option}: the study sets that itself")
    _, settings = read_settings(options.yaml, as_yaml(own, overrides))
    made_of = {"seeds": seeds, "corpora": ",".join(trains)}
    made_of |= {"options": sorted(overrides), "settings": settings}
    study_path = folder / STUDY
    before = json.loads(study_path.read_text()) if study_path.exists() else None
    if before != made_of and (before or any(folder.glob(f"*/{BACKEND}"))):
        parser.error(
            f"{folder} holds a study of other seeds, corpora, options or "
            f"another yaml (see {STUDY} there); take another --output_folder"
        )
    write_json(study_path, made_of)
    corpus = Corpus(options.data_folder, folder / "corpus")
    judge(folder, None, corpus, seeds)
    for model in tqdm(MODELS, unit="model"):
        own = {**shared, **model.options(folder)}
        own["output_folder"] = str(folder / model.name)
        text = as_yaml(own, overrides)
        make(folder / model.name, options.yaml, text, model)
        judge(folder, model, corpus, seeds)
        with atomic_write(folder / "study.md") as out:
            out.write("\n\n".join(tables(folder)) + "\n")
    print((folder / "study.md").read_text("utf-8"))


def as_yaml(own, words):
    """Turns the study's settings and the command line's into overrides."""
    pairs = (word.removeprefix("--").split("=", 1) for word in words)
    typed = [as_typed(name, value) for name, value in pairs]
    return "\n".join([dump_settings(own), *typed])


def make(folder, yaml, overrides, model):
    """Pre-trains a model, unless that is done."""
    settings, identity = read_settings(yaml, overrides)
    if model.objective != "untrained":
        pretrain(settings, identity, {"device": "cpu", "noprogressbar": True})
    elif not (folder / MODEL).exists():
        torch.manual_seed(settings.seed)
        network = Wav2Vec2BertModel(settings.new_model())
        # The folder is renamed once its weights are written: an interruption
        # leaves no folder without weights.
        torn = folder / f"{MODEL}.torn"
        network.save_pretrained(torn)
        torn.rename(folder / MODEL)


class Corpus:
    """Log-mel frames of the back-end's training speech and of the trials.

    Each training utterance has two views: a crop, and another crop that is
    augmented.
    """

    def __init__(self, folder, features):
        self.trials = read_trials(folder / "trials.txt", folder)
        root = folder / "train"
        paths = [path for path, problem in find_audio(root) if not problem]
        random.Random(0).shuffle(paths)
        paths = sorted(paths[:UTTERANCES])
        # Speakers serve to measure clusters, and to train the back-end with
        # labels.
        names = [pathlib.Path(path).parts[0] for path in paths]
        self.speakers = np.unique(names, return_inverse=True)[1]
        write_log_mels(views(root, paths), features / "train")
        tests = tqdm(self.trials.utterances, "test", unit="file")
        write_log_mels(
            (read_audio(folder / p) for p in tests), features / "test"
        )
        self.train, self.test = (
            LogMels(features / part) for part in ("train", "test")
        )

    def statistics(self, model):
        """Returns statistics of all layers of training and test utterances.

        Their shapes are (N, 2, layers, size) and (M, layers, size).
        """
        train = [
            statistics(model, torch.stack([self.train[n] for n in rows]))
            for rows in torch.arange(len(self.train)).split(64)
        ]
        test = [statistics(model, log_mels[None]) for log_mels in self.test]
        return torch.cat(train).unflatten(0, (-1, 2)), torch.cat(test)


def views(root, paths):
    """Yields two crops of each file, the second one augmented."""
    torch.manual_seed(0)
    augment, rng = Augmenter(clean=0.25, channel=0.5), random.Random(0)
    for start in tqdm(range(0, len(paths), 64), "views", unit="batch"):
        crops = [
            read_crops(path, 0.0, probe(path).seconds, SECONDS, 2, rng=rng)
            for path in (root / name for name in paths[start : start + 64])
        ]
        crops = torch.stack(crops)
        crops[:, 1] = augment(crops[:, 1].contiguous())
        yield from crops.flatten(0, 1)


def judge(folder, model, corpus, seeds):
    """Writes the error rates of a model under the back-end."""
    folder = folder / (LOG_MEL_STATISTICS if model is None else model.name)
    if (folder / BACKEND).exists():
        return
    folder.mkdir(exist_ok=True)
    network = None
    if model is not None:
        network = Wav2Vec2BertModel.from_pretrained(folder / MODEL).eval()
    train, test = corpus.statistics(network)

    @torch.no_grad()
    def eer(embed):
        whitening = Whitening(1.0).fit(embed(train.flatten(0, 1)).numpy())
        vectors = whitening(embed(test).numpy())
        scores = cosine_scores(vectors, corpus.trials)
        return figures_of(scores, corpus.trials)["eer"]

    first = first_labels(train)
    figures = {
        "sum": eer(Head(train).summed),
        "ami": [ami(corpus.speakers, first)],
    }
    for seed in seeds:
        speakers = torch.from_numpy(corpus.speakers)
        head = train_head(train, speakers, seed, gated=False)
        figures.setdefault("labels", []).append(eer(head))
        weights = head.weights.softmax(0).tolist()
        figures.setdefault("weights", []).append(weights)
        head, labels = label_free(train, first, seed)
        figures.setdefault("label_free", []).append(eer(head))
        figures["ami"].append(ami(speakers, labels))
    write_json(folder / BACKEND, figures)


def tables(folder):
    """Yields a table of each model's figures, and one of each claim's."""
    rows, figures = [], {}
    for model in (None, *MODELS):
        place = folder / (LOG_MEL_STATISTICS if model is None else model.name)
        if not (place / BACKEND).exists():
            continue
        figures[model] = json.loads((place / BACKEND).read_text())
        record = {}
        if (place / RECORD).exists():
            record = json.loads((place / RECORD).read_text())
        rows.append([*what(model), *costs(record), *rates(figures[model])])
    header = ["objective", "size", "mixed", "hours", "CPU minutes"]
    header += ["loss", "accuracy %", "EER %, sum of layers"]
    header += ["EER %, true labels", "EER %, Stage II", "AMI, first"]
    yield markdown_table([*header, "AMI, last", "layers' weights"], rows)
    rows = []
    for claim, pairs in claims(figures).items():
        changes = [
            [
                np.mean(figures[one][kind]) - np.mean(figures[other][kind])
                for one, other in pairs
            ]
            for kind in ("labels", "label_free")
        ]
        rows.append([claim, len(pairs), *map(spread, changes)])
    header = ["one, not the other", "pairs", "change of EER, true labels"]
    yield markdown_table([*header, "change of EER, Stage II"], rows)


def what(model):
    """Returns a model's cells: objective, size, and "yes" for mixing."""
    if model is None:
        return LOG_MEL_STATISTICS, "", ""
    return TITLES[model.objective], model.size, "yes" if model.mixed else ""


def costs(record):
    """Returns the cells of a pre-training: hours, minutes, loss, accuracy."""
    if not record:
        return [""] * 4
    minutes = sum(epoch["cpu_seconds"] for epoch in record["epochs"]) / 60
    last = record["epochs"][-1]
    figures = record["hours"], minutes, last["loss"], 100 * last["accuracy"]
    return [f"{figure:.{n}f}" for figure, n in zip(figures, (1, 1, 2, 1))]


def rates(figures):
    """Returns a model's cells: error rates, AMI, weights of the layers."""
    weights = np.mean(figures["weights"], axis=0)
    return [
        f"{figures['sum']:.1f}",
        spread(figures["labels"]),
        spread(figures["label_free"]),
        f"{figures['ami'][0]:.2f}",
        spread(figures["ami"][1:], 1, 2),
        ", ".join(f"{weight:.2f}" for weight in weights),
    ]


def claims(figures):
    """Returns, for each claim, the pairs of models that differ only in that."""
    pretrained = [m for m in figures if m and m.objective != "untrained"]
    changed = {
        "pre-trained, not untrained": dict(objective="untrained"),
        "large, not small": dict(size="small"),
        "all speech, not a sixteenth": dict(share=PART),
        "mixed, not": dict(mixed=False),
    }
    for one, other in itertools.combinations(OBJECTIVES, 2):
        changed[f"{TITLES[one]}, not {TITLES[other]}"] = one, other
    pairs = {}
    for claim, change in changed.items():
        only = None
        if isinstance(change, tuple):
            only, change = change[0], dict(objective=change[1])
        pairs[claim] = [
            (model, other)
            for model in pretrained
            if only in (None, model.objective)
            and (other := dataclasses.replace(model, **change)) != model
            and other in figures
        ]
    return {claim: some for claim, some in pairs.items() if some}


if __name__ == "__main__":
    main()
