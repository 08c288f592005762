"""Writes an encoder's weights to a folder, with a yaml for SpeechBrain."""

import inspect
import pathlib
import pydoc
import re

import numpy as np
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.logger import get_logger

from lgl_plugin.dataio.folder import refuse_recordings
from lgl_plugin.inference.backends import Backend
from lgl_plugin.inference.extractor import Extractor
from lgl_plugin.inference.onnx_export import ONNX
from lgl_plugin.nnet.encoders import COSINE_CLASSIFIER, Encoder
from lgl_plugin.runs.plain import dump_settings
from lgl_plugin.runs.pretrained import YAML, PathLike
from lgl_plugin.runs.state import STATE
from lgl_plugin.runs.weights import (
    AFFINE,
    CLASSIFIER,
    ENCODER,
    load_weights,
    read_weights,
    save_tensors,
)
from lgl_plugin.utils.files import atomic_write, checksum, read_json

logger = get_logger(__name__)

MEAN, NAMES = "mean_var_norm_emb.ckpt", "label_encoder.ckpt"
# Prefixes that DistributedDataParallel and torch.compile add to weights' names.
WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod)\.)+")

# SpeechBrain's inference classes call mean_var_norm with features and lengths
# even where the encoder has none; a sequence of no layers returns the features.
IDENTITY = {
    "!new:speechbrain.nnet.containers.LengthsCapableSequential": {
        "input_shape": [None, None, None]
    }
}
FIRST_LINE = "# A speaker encoder, see README.md.\n"
CARD_LINE = "library_name: speechbrain"  # of every model card
LABEL_ENCODER = "!new:speechbrain.dataio.encoder.CategoricalEncoder {}"
# The end of every exported yaml, after the model's own part.
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


class NotExportable(ValueError):
    """An encoder that can be trained, but that SpeechBrain cannot load."""


class InferenceModel:
    """An encoder's weights, and the yaml by which SpeechBrain builds it.

    `settings` are a stage's, as `plain_settings` reads them; the setting `kind`
    says how to build the encoder. `encoder` and, in Stage II, `classifier` are
    paths of state dicts. A `backend` becomes the last layers of
    `embedding_model`; the network's weights still have a file of their own, for
    Stage II to start from. Raises FileNotFoundError or ValueError if weights
    are missing or do not fit.
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
            raise NotExportable(
                f"{kind}: {encoder_class.split(':')[-1]} cannot be exported, "
                "as it has no features and network, which SpeechBrain loads: "
                "make it an lgl_plugin.nnet.encoders.Encoder of both"
            )
        tag, arguments = _instance(parts["network"])
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
        else:
            if not _takes_lengths(tag):
                self._append({})
            if classifier is not None:
                self._add_classifier(read_state_dict(classifier))
        text = dump_settings(self.parts)
        packages = {*re.findall(r"!(?:new|name|apply):(\w+)", text)}
        # The other package that SpeechBrain needs to load the folder.
        self.package = min(packages - {"speechbrain", "torch"}, default="")
        self.built = load_hyperpyyaml(text)
        network = self.built[self.loadables["embedding_model"]]
        if hasattr(network, "described"):  # it was made from other files
            arguments.update(network.described())
        load_weights(network, encoder, self.encoder)
        if self.affine is not None:
            self.built["backend"].load_state_dict(self.affine)

    def _add_classifier(self, weights):
        """Adds a classifier, SpeechBrain's or one with sub-centres."""
        tag, arguments = _instance(self.settings["new_classifier"])
        centres = weights.get("weight")
        if centres is None or centres.ndim not in (2, 3):
            raise ValueError("the classifier has no weight of a row a class")
        self.n_classes = centres.shape[-2]
        if centres.ndim == 3:
            # A class's score is that of its best centre: each centre becomes
            # an output with the class's name, and SpeechBrain names the best.
            weights = {"weight": centres.flatten(0, 1)}
            tag = COSINE_CLASSIFIER
            arguments = {"input_size": centres.shape[-1]}
        outputs = len(weights["weight"])
        self.classifier = weights
        self.parts["classifier"] = {tag: {**arguments, "out_neurons": outputs}}

    def _add_backend(self, backend):
        """Appends (x / |x| - mean) projection to the network.

        The layers are SpeechBrain's and torch's own: RMSNorm scales embeddings
        to the length sqrt(D). The classifier is left out, because it works on
        the bare embeddings.
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
        self.parts["backend"] = {"!new:speechbrain.nnet.linear.Linear": affine}
        unit_length = {"!new:torch.nn.RMSNorm": {**unit, "eps": 1.0e-20}}
        layers = {"unit_length": unit_length, "backend": {"!ref": "<backend>"}}
        self._append(layers)
        self.loadables["backend"] = "backend"

    def _append(self, layers):
        """Appends layers to the network, in a container of SpeechBrain's.

        SpeechBrain calls the container with lengths, which it passes only to
        the layers that take them.
        """
        self.parts["network"] = self.parts.pop("embedding_model")
        self.parts["embedding_model"] = {
            "!new:speechbrain.nnet.containers.LengthsCapableSequential": {
                "network": {"!ref": "<network>"},
                **layers,
            }
        }
        self.loadables = {"embedding_model": "network"}

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
        # SpeechBrain loads no folder without hyperparams.yaml. So that file is
        # deleted first and written last: after a crash no mixture of two
        # exports can be loaded. The other files are of the old weights.
        before = _contents(folder)
        for name in (YAML, AFFINE, MEAN, CLASSIFIER, NAMES):
            (folder / name).unlink(missing_ok=True)
        save_tensors(self.encoder, folder / ENCODER)
        if self.affine is not None:
            save_tensors(self.affine, folder / AFFINE)
        loadables = dict(self.loadables)
        if mean is not None:
            # The form in which InputNormalization keeps its statistics.
            statistics = {"glob_mean": mean, "glob_std": torch.ones_like(mean)}
            save_tensors({"count": 1, **statistics}, folder / MEAN)
            loadables["mean_var_norm_emb"] = "mean_var_norm_emb"
        text = FIRST_LINE
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
        optional = {} if threshold is None else {"threshold": threshold}
        text += f"\n{dump_settings({**optional, **self.parts})}"
        text += FIXED_PART.format(label_encoder=label_encoder)
        text += "".join(
            f"        {n}: !ref <{to}>\n" for n, to in loadables.items()
        )
        # encoder.onnx takes minutes to make: for the same encoder it stays.
        if before != {**_contents(folder), YAML: text}:
            (folder / ONNX).unlink(missing_ok=True)
        with atomic_write(folder / "README.md") as out:
            out.write(card)
        with atomic_write(folder / YAML) as out:
            out.write(text)
        # Two decimals: a threshold found without labels is within 0.1 of the
        # one that labels give.
        shown = "not found" if threshold is None else f"{threshold:.2f}"
        logger.info("Exported to %s, threshold %s", folder, shown)


def check_target(folder: PathLike, run: PathLike | None = None) -> None:
    """Raises FileExistsError if an export would replace or join foreign files.

    For example, a project would lose its README.md, or the encoder's files
    would lie among recordings or folders of a corpus. A `run` may replace its
    own exports.
    """
    folder = pathlib.Path(folder)
    marks = {YAML: FIRST_LINE, "README.md": CARD_LINE}
    for name, mark in marks.items():
        path = folder / name
        if path.is_file() and mark not in path.read_text("utf-8", "replace"):
            raise FileExistsError(
                f"{path} is of no exported encoder and would be replaced: "
                "name another folder"
            )
    target = folder.resolve()
    own = None if run is None else pathlib.Path(run).resolve()
    for owner in (target, *target.parents):
        state = read_json(owner / STATE)
        if not {"settings", "done"} <= state.keys():
            continue  # no state.json, or another program's
        step = target.relative_to(owner).as_posix()
        mine = owner == own and step.startswith("export/")
        if step == "." or step in state["done"] and not mine:
            raise FileExistsError(
                f"{folder} is of the run {owner}, whose files would be "
                "replaced: name another folder"
            )
        break
    # In an exported folder a recording is allowed, as an example.
    if not (folder / YAML).exists():
        refuse_recordings(folder)
        entries = folder.iterdir() if folder.is_dir() else ()
        for path in entries:  # such as the speakers' folders of a corpus
            if path.is_dir() and not path.name.startswith("."):
                raise FileExistsError(
                    f"{folder} has other folders, such as {path.name}, and the "
                    "encoder's files would lie among them: name another folder"
                )


def read_state_dict(path: PathLike) -> dict[str, torch.Tensor]:
    """Reads a state dict, without the prefixes that wrappers add to names."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    weights = read_weights(path)
    named = isinstance(weights, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor)
        for name, value in weights.items()
    )
    if not named:
        raise ValueError(
            f"{path} is no state dict: it holds more than tensors by their "
            "names. Save the network's state_dict() alone."
        )
    return {WRAPPERS.sub("", name): value for name, value in weights.items()}


def _contents(folder):
    """Returns checksums of the weights, and the yaml's text, by file name."""
    weights = (folder / name for name in (ENCODER, AFFINE))
    sums = {path.name: checksum(path) for path in weights if path.exists()}
    yaml = folder / YAML
    return {**sums, YAML: yaml.read_text("utf-8") if yaml.exists() else ""}


def _instance(setting):
    """Returns tag and arguments of the instance that a `!name:` makes.

    A list of arguments becomes a dict by their names, so that more can be
    added.
    """
    ((tag, arguments),) = setting.items()
    if isinstance(arguments, list):
        made = inspect.signature(pydoc.locate(tag.partition(":")[2]))
        bound = made.bind_partial(*arguments)
        variable = inspect.Parameter.VAR_POSITIONAL
        if all(p.kind is not variable for p in made.parameters.values()):
            arguments = bound.arguments
    elif arguments:
        arguments = dict(arguments)
    return tag.replace("!name:", "!new:", 1), arguments or {}


def _takes_lengths(tag):
    """Tells whether a network's class takes lengths after features."""
    network = pydoc.locate(tag.partition(":")[2])
    try:
        inspect.signature(network.forward).bind("self", "features", "lengths")
    except TypeError:
        return False
    return True
