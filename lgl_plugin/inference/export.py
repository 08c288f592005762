"""A trained encoder as a folder that SpeechBrain alone loads.

> lgl export results/lgl/1
> lgl export results/lgl/1 iter1/classifier --output=mine
> lgl export encoder.ckpt --yaml=mine.yaml --output=mine

The folder holds `hyperparams.yaml`, `embedding_model.ckpt`, in Stage II the
classifier, with a back-end `backend.ckpt` in its place, and a model card,
`README.md`. SpeechBrain's `SpeakerRecognition` and `EncoderClassifier` take it
as `source`, its verification script takes it as `pretrain_path`, without the
back-end, and it has the form of a repository at Hugging Face.
"""

from __future__ import annotations

import dataclasses
import inspect
import pathlib
import re

import numpy as np
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.logger import get_logger

from lgl_plugin.dataio.audio import BadAudio
from lgl_plugin.dataio.labels import read_labels
from lgl_plugin.dataio.manifest import Manifest, held_out, load_manifest
from lgl_plugin.inference.backends import Backend, load_backend
from lgl_plugin.inference.calibration import find_threshold
from lgl_plugin.inference.extractor import Extractor
from lgl_plugin.inference.model_card import (
    last_name,
    model_card,
    pretrained_card,
)
from lgl_plugin.inference.onnx_export import ONNX, export_onnx
from lgl_plugin.nnet.encoders import COSINE_CLASSIFIER, Encoder
from lgl_plugin.runs.metrics_log import read_metrics, summarise
from lgl_plugin.runs.plain import dump_settings
from lgl_plugin.runs.state import check_artefact, read_state
from lgl_plugin.runs.weights import read_tensors, save_tensors
from lgl_plugin.utils.distributed import from_main
from lgl_plugin.utils.files import atomic_write

logger = get_logger(__name__)

PathLike = str | pathlib.Path
ENCODER, CLASSIFIER = "embedding_model.ckpt", "classifier.ckpt"
BACKEND = "backend.npz"  # beside a phase's weights
AFFINE = "backend.ckpt"  # the same in an exported folder
MEAN, NAMES = "mean_var_norm_emb.ckpt", "label_encoder.ckpt"
# Prefixes that data parallelism and torch.compile give weights' names.
WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod)\.)+")

# SpeechBrain's inference classes call mean_var_norm with features and lengths
# even where the encoder has none; a sequence of no layers returns the features.
IDENTITY = {
    "!new:speechbrain.nnet.containers.LengthsCapableSequential": {
        "input_shape": [None, None, None]
    }
}
LABEL_ENCODER = "!new:speechbrain.dataio.encoder.CategoricalEncoder {}"
# The part of every exported yaml that stands below the model's own.
FIXED_PART = """
mean_var_norm_emb: !new:speechbrain.processing.features.InputNormalization
    norm_type: global
    std_norm: false

audio_normalizer: !new:speechbrain.dataio.preprocess.AudioNormalizer
    sample_rate: !ref <sample_rate>
{label_encoder}
modules:
    compute_features: !ref <compute_features>
    mean_var_norm: !ref <mean_var_norm>
    embedding_model: !ref <embedding_model>
    classifier: !ref <classifier>
    mean_var_norm_emb: !ref <mean_var_norm_emb>

pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
"""


class InferenceModel:
    """Weights, with what SpeechBrain needs to build the modules around them.

    `settings` are a stage's, as `plain_settings` reads them, of which `kind`
    says how to build the encoder; `encoder` and, of Stage II, `classifier` are
    paths of state dicts. A `backend` becomes the last layers of
    `embedding_model`, but the network's weights stay a file of their own, for
    Stage II to start from. FileNotFoundError or ValueError if there are no such
    weights that fit.
    """

    def __init__(
        self,
        settings: dict,
        encoder: PathLike,
        classifier: PathLike | None = None,
        kind: str = "new_encoder",
        backend: Backend | None = None,
    ):
        self.settings = settings
        self.n_classes = 0
        self.encoder = read_state_dict(encoder)
        self.classifier = None
        encoder_class, parts = _instance(settings[kind])
        if not {"features", "network"} <= parts.keys():
            raise ValueError(
                f"{kind}: {encoder_class.split(':')[-1]} cannot be exported, "
                "as it has no features and network, which SpeechBrain loads: "
                "make it an lgl_plugin.nnet.encoders.Encoder of both"
            )
        tag, arguments = _instance(parts["network"])
        arguments = dict(arguments)
        self.encoder_class = tag.rpartition(".")[2]
        self.parts = {
            "sample_rate": settings["sample_rate"],
            "compute_features": dict([_instance(parts["features"])]),
            "mean_var_norm": dict(
                [_instance(parts.get("normalise") or IDENTITY)]
            ),
            "embedding_model": {tag: arguments},
            # EncoderClassifier refuses a yaml without one, even if nothing
            # is ever classified.
            "classifier": {
                COSINE_CLASSIFIER: {"input_size": 1, "out_neurons": 1}
            },
        }
        # The folder's file of weights for each entry of the yaml.
        self.loadables = {"embedding_model": "embedding_model"}
        self.affine = None
        if backend is not None:
            self._add_backend(backend)
        elif classifier is not None:
            self._add_classifier(read_state_dict(classifier))
        text = dump_settings(self.parts)
        packages = {*re.findall(r"!(?:new|name|apply):(\w+)", text)}
        # Whose classes SpeechBrain needs beside its own to load the folder.
        self.package = min(packages - {"speechbrain", "torch"}, default="")
        self.built = load_hyperpyyaml(text)
        network = self.built[self.loadables["embedding_model"]]
        if hasattr(network, "described"):  # made from files of elsewhere
            arguments.update(network.described())
        try:
            network.load_state_dict(self.encoder)
        except RuntimeError as error:
            first = str(error).strip().splitlines()[:2]
            raise ValueError(
                f"{encoder} does not fit the {self.encoder_class} of "
                f"{kind} (another width, or not an encoder): {' '.join(first)}"
            ) from error
        if self.affine is not None:
            self.built["backend"].load_state_dict(self.affine)
            if "lengths" not in inspect.signature(network.forward).parameters:
                # The frames of padding would then count.
                raise ValueError(
                    f"{self.encoder_class} takes no `lengths`, by which "
                    "SpeechBrain's container of it and the back-end passes "
                    "them on: export with --backend=none"
                )

    def _add_classifier(self, weights):
        """Takes a classifier over, SpeechBrain's or one with sub-centres."""
        tag, arguments = _instance(self.settings["new_classifier"])
        centres = weights.get("weight")
        if centres is None or centres.ndim not in (2, 3):
            raise ValueError("the classifier has no weight of a row a class")
        self.n_classes = centres.shape[-2]
        if centres.ndim == 3:
            # A class scores as the best of its centres: as many outputs of
            # one name, of which SpeechBrain names the best.
            weights = {"weight": centres.flatten(0, 1)}
            tag = COSINE_CLASSIFIER
            arguments = {"input_size": centres.shape[-1]}
        outputs = len(weights["weight"])
        self.classifier = weights
        self.parts["classifier"] = {tag: {**arguments, "out_neurons": outputs}}

    def _add_backend(self, backend):
        """Puts (x / |x| - mean) projection behind the network.

        By SpeechBrain's and torch's own layers: RMSNorm takes embeddings to
        the length sqrt(D). The classifier is left out, as it tells the bare
        embeddings apart.
        """
        size, size_after = backend.projection.shape
        weight = torch.from_numpy(backend.projection.T)
        bias = -weight @ torch.from_numpy(backend.mean)
        self.affine = {
            "w.weight": (weight / np.sqrt(size)).float(),
            "w.bias": bias.float(),
        }
        unit = {"normalized_shape": size, "elementwise_affine": False}
        affine = {"input_size": size, "n_neurons": size_after}
        self.parts["network"] = self.parts.pop("embedding_model")
        self.parts["backend"] = {"!new:speechbrain.nnet.linear.Linear": affine}
        self.parts["embedding_model"] = {
            "!new:speechbrain.nnet.containers.LengthsCapableSequential": {
                "network": {"!ref": "<network>"},
                "unit_length": {
                    "!new:torch.nn.RMSNorm": {**unit, "eps": 1.0e-20}
                },
                "backend": {"!ref": "<backend>"},
            }
        }
        self.loadables = {"embedding_model": "network", "backend": "backend"}

    def extractor(self, device: str = "cpu") -> Extractor:
        """Makes an Extractor around the encoder."""
        loader = self.settings.get("dataloader_options", {})
        encoder = Encoder(
            self.built["compute_features"],
            self.built["embedding_model"],
            self.built["mean_var_norm"],
        )
        return Extractor(
            encoder,
            device,
            self.settings["sample_rate"],
            num_workers=loader.get("num_workers", 0),
        )

    def save(
        self,
        folder: PathLike,
        card: str,
        threshold: float | None = None,
        mean: torch.Tensor | None = None,
    ) -> None:
        """Writes the folder; files of an earlier export are replaced.

        `card` is the model card, `threshold` that of the cosine, and `mean`
        the mean embedding (D,) that `encode_batch(..., normalize=True)`
        subtracts.
        """
        folder = pathlib.Path(folder)
        # SpeechBrain loads no folder without this file: it goes first and
        # comes last, so that a crash leaves no mixture of two exports.
        (folder / "hyperparams.yaml").unlink(missing_ok=True)
        save_tensors(self.encoder, folder / ENCODER)
        if self.affine is not None:
            save_tensors(self.affine, folder / AFFINE)
        loadables = dict(self.loadables)
        if mean is not None:
            # The form in which InputNormalization keeps its statistics.
            statistics = {"glob_mean": mean, "glob_std": torch.ones_like(mean)}
            save_tensors({"count": 1, **statistics}, folder / MEAN)
            loadables["mean_var_norm_emb"] = "mean_var_norm_emb"
        text = "# A speaker encoder, see README.md.\n"
        label_encoder = ""
        if self.classifier is None:
            text += "# The classifier has no weights: SpeechBrain wants one.\n"
        else:
            save_tensors(self.classifier, folder / CLASSIFIER)
            # The form in which CategoricalEncoder keeps its labels.
            names = [f"'pseudo-speaker {n}'" for n in range(self.n_classes)]
            outputs = len(self.classifier["weight"])
            rows = [f"{names[n % len(names)]} => {n}" for n in range(outputs)]
            rows += ["================", "'starting_index' => 0", ""]
            with atomic_write(folder / NAMES) as out:
                out.write("\n".join(rows))
            label_encoder = f"\nlabel_encoder: {LABEL_ENCODER}\n"
            loadables |= {n: n for n in ("classifier", "label_encoder")}
        given = {} if threshold is None else {"threshold": threshold}
        text += f"\n{dump_settings({**given, **self.parts})}"
        text += FIXED_PART.format(label_encoder=label_encoder)
        text += "".join(
            f"        {n}: !ref <{to}>\n" for n, to in loadables.items()
        )
        with atomic_write(folder / "README.md") as out:
            out.write(card)
        with atomic_write(folder / "hyperparams.yaml") as out:
            out.write(text)
        # Found without labels, it lies within 0.1 of what labels would give.
        found = "not found" if threshold is None else f"{threshold:.2f}"
        logger.info("Exported to %s, threshold %s", folder, found)


@dataclasses.dataclass(frozen=True)
class TrainedStep:
    """A step of a run that left an encoder, such as `name` "iter2/gated".

    `short_name` is that of its exported folder; `settings` are those of all
    stages that the encoder has passed, by stage; `manifest` is what it was
    trained on; `pseudo`, of Stage II, are utterances and pseudo-labels.
    """

    name: str
    short_name: str
    settings: dict
    model: InferenceModel
    manifest: Manifest
    pseudo: tuple | None


def export(
    run: PathLike,
    step: str | None = None,
    folder: PathLike | None = None,
    device: str = "cpu",
    data_folder: str | None = None,
    threshold: float | None = None,
    licence: str = "other",
    backend: bool | None = None,
    onnx: bool = False,
) -> dict[str, float | None]:
    """Exports an encoder of a run.

    Arguments
    ---------
    run : str or pathlib.Path
        The run folder.
    step : str, optional
        "stage1" or "iter2/gated"; "iter2" for that round's latest; or a
        folder below the run's with an encoder. By default the latest of all.
    folder : str or pathlib.Path, optional
        Where to write. By default `<run>/export/iter2` for a round's latest
        encoder, `<run>/export/iter2-classifier` for another of it.
    device : str
        Where utterances are embedded to find the threshold.
    data_folder : str, optional
        Where the run's audio is now, if it has moved.
    threshold : float, optional
        Of the cosine. By default found without labels.
    licence : str
        Of the weights, as Hugging Face names it.
    backend : bool, optional
        Whether the back-end that was fitted at the step's end becomes part of
        the model. By default as the yaml's `backend` says: whitening lowers
        the error of some encoders and raises that of others, and nothing
        known without labels tells them apart. The classifier, which works on
        the bare embeddings, is then left out.
    onnx : bool
        Whether the folder gets `encoder.onnx`, too.

    Returns
    -------
    dict
        The "threshold", None if none could be found.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no run or no such step; if the weights are damaged or do not
        fit the settings, or no utterance can be read.

    Example
    -------
    >>> export("results/lgl/1", "iter2", "mine")  # doctest: +SKIP
    {'threshold': 0.38}
    """
    run = pathlib.Path(run)
    source = read_trained_step(run, step, data_folder, backend)
    model, manifest = source.model, source.manifest
    share, seed = (model.settings[k] for k in ("held_out_share", "seed"))
    decision = None if threshold is None else (threshold, "given")
    mean = None
    if threshold is None:
        extract = model.extractor(device)
        try:
            decision, vectors = find_threshold(
                extract, manifest, share, seed, source.pseudo
            )
        except BadAudio as error:
            raise ValueError(
                f"no threshold can be found: {error}. If the audio has moved, "
                "say where by --data_folder; or give a --threshold."
            ) from error
        mean = torch.from_numpy(vectors.mean(axis=0))
        threshold = decision[0] if decision else None
    data = {
        "name": last_name(model.settings["data_folder"]),
        "utterances": len(manifest),
        "held_out": len(held_out(len(manifest), share, seed)[1]),
        "hours": float(manifest.durations.sum()) / 3600,
    }
    card = model_card(
        source.settings,
        model.encoder_class,
        source.name,
        n_classes=model.n_classes,
        decision=decision,
        data=data,
        rows=summarise(read_metrics(run)),
        licence=licence,
        backend=model.affine is not None,
        package=model.package,
    )
    folder = folder or run / "export" / source.short_name
    # Of several processes all learn of a full disk: one that alone went on to
    # the next collective call would stop the training.
    from_main(model.save, folder, card, threshold, mean)
    if onnx:
        from_main(export_onnx, folder, pathlib.Path(folder) / ONNX)
    return {"threshold": threshold}


def read_trained_step(
    run: PathLike,
    step: str | None = None,
    data_folder: str | None = None,
    backend: bool | None = False,
) -> TrainedStep:
    """Reads what a step of a run has left; arguments and errors as `export`."""
    run = pathlib.Path(run)
    if not (run / "state.json").exists():
        raise FileNotFoundError(
            f"{run} holds no state.json: is it the output_folder of a run? "
            "A checkpoint of no run takes --yaml."
        )
    state = read_state(run)
    steps = [
        name
        for name in state["done"]
        if not name.startswith("export") and (run / name / ENCODER).exists()
    ]
    step = pathlib.PurePath(step or "").as_posix()  # "." for none
    if step == "." or re.fullmatch(r"iter\d+", step):
        inside = [name for name in steps if step in (".", name.split("/")[0])]
        step = inside[-1] if inside else step
    encoder = run / step / ENCODER
    if not encoder.is_file():
        raise FileNotFoundError(
            f"there is no encoder in {run / step}. This run has those of "
            f"{', '.join(steps) or 'no step yet'}."
        )
    check_artefact(encoder)
    place = step.split("/")[0]
    iteration = int(place[4:]) if place.startswith("iter") else 0
    stage = "stage 2" if iteration else "stage 1"
    chosen = state["settings"][stage]
    last = iteration == chosen.get("n_iterations")
    wide = last and chosen.get("new_last_encoder")
    fitted = None
    if chosen.get("backend") if backend is None else backend:
        path = encoder.with_name(BACKEND)
        if not path.exists():
            raise FileNotFoundError(
                f"there is no back-end {path}: the run could fit none. "
                "--backend=none exports the encoder alone."
            )
        check_artefact(path)
        fitted = load_backend(path)
    model = InferenceModel(
        chosen,
        encoder,
        encoder.with_name(CLASSIFIER) if iteration else None,
        "new_last_encoder" if wide else "new_encoder",
        fitted,
    )
    manifest = load_manifest(
        chosen["manifest"] or run / "manifest.csv",
        data_folder or chosen["data_folder"],
        chosen.get("allow_outside_data_folder", False),
    )
    labels = run / place / "labels" / "labels.csv"
    latest = [name for name in steps if name.split("/")[0] == place][-1:]
    settings = sorted(state["settings"].items())
    return TrainedStep(
        name=step,
        short_name=place if [step] == latest else step.replace("/", "-"),
        settings={name: value for name, value in settings if name <= stage},
        model=model,
        manifest=manifest,
        pseudo=read_labels(labels) if iteration else None,
    )


def export_checkpoint(
    encoder: PathLike,
    settings: dict,
    folder: PathLike,
    threshold: float | None = None,
    licence: str = "other",
) -> None:
    """Exports a checkpoint that belongs to no run.

    Arguments
    ---------
    encoder : str or pathlib.Path
        A state dict, also of a module within data parallelism or
        torch.compile.
    settings : dict
        A yaml of the recipe, as `plain_settings` reads it; or, of weights
        that say what they are of, what `encoder_settings` returns.
    folder, threshold, licence
        As of `export`; without a threshold the folder has none.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such checkpoint, or it fits no encoder of the yaml.

    Example
    -------
    >>> from speechbrain.lobes.models.Xvector import Xvector
    >>> from lgl_plugin.runs.settings import plain_settings
    >>> settings = plain_settings('''
    ... stage: 1
    ... sample_rate: 16000
    ... new_encoder: !name:lgl_plugin.nnet.encoders.Encoder
    ...     features: !name:speechbrain.lobes.features.Fbank {n_mels: 24}
    ...     network: !name:speechbrain.lobes.models.Xvector.Xvector
    ...         in_channels: 24
    ... ''')
    >>> folder = getfixture("tmp_path")
    >>> torch.save(Xvector(in_channels=24).state_dict(), folder / "mine.ckpt")
    >>> export_checkpoint(folder / "mine.ckpt", settings, folder / "mine")
    >>> sorted(file.name for file in (folder / "mine").iterdir())
    ['README.md', 'embedding_model.ckpt', 'hyperparams.yaml']
    """
    kinds = ("new_encoder", "new_last_encoder")
    kinds = [kind for kind in kinds if settings.get(kind)]
    if not kinds:
        raise ValueError("the yaml has no new_encoder: is it of this recipe?")
    for kind in kinds:
        try:
            model = InferenceModel(settings, encoder, kind=kind)
            break
        except ValueError:
            if kind == kinds[-1]:
                raise
    decision = None if threshold is None else (threshold, "given")
    if "stage" in settings:
        card = model_card(
            {f"stage {settings['stage']}": settings},
            model.encoder_class,
            decision=decision,
            licence=licence,
            package=model.package,
        )
    else:
        facts = {
            "encoder": model.encoder_class,
            "package": model.package,
            "rate": settings["sample_rate"],
            "threshold": threshold,
        }
        card = pretrained_card(facts, str(encoder), licence)
    model.save(folder, card, threshold)


def read_state_dict(path: PathLike) -> dict[str, torch.Tensor]:
    """Reads a state dict, without what wrappers put before the names."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        weights = read_tensors(path)
        if not all(isinstance(v, torch.Tensor) for v in weights.values()):
            raise TypeError("it holds more than tensors")
        return {WRAPPERS.sub("", n): value for n, value in weights.items()}
    except Exception as error:  # torch raises what its unpickler does
        reason = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"{path} is no state dict: {reason[0]}") from error


def _instance(setting):
    """Returns tag and arguments of the instance that a `!name:` makes."""
    ((tag, arguments),) = setting.items()
    return tag.replace("!name:", "!new:", 1), arguments or {}
