"""An encoder's weights in a folder, with a yaml that SpeechBrain loads."""

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
# Prefixes that data parallelism and torch.compile give weights' names.
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


class NotExportable(ValueError):
    """An encoder that trains, but of which SpeechBrain could load nothing."""


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
                self._put_behind({})
            if classifier is not None:
                self._add_classifier(read_state_dict(classifier))
        text = dump_settings(self.parts)
        packages = {*re.findall(r"!(?:new|name|apply):(\w+)", text)}
        # The other package that SpeechBrain needs to load the folder.
        self.package = min(packages - {"speechbrain", "torch"}, default="")
        self.built = load_hyperpyyaml(text)
        network = self.built[self.loadables["embedding_model"]]
        if hasattr(network, "described"):  # made from files of elsewhere
            arguments.update(network.described())
        load_weights(network, encoder, self.encoder)
        if self.affine is not None:
            self.built["backend"].load_state_dict(self.affine)

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
        self.parts["backend"] = {"!new:speechbrain.nnet.linear.Linear": affine}
        unit_length = {"!new:torch.nn.RMSNorm": {**unit, "eps": 1.0e-20}}
        layers = {"unit_length": unit_length, "backend": {"!ref": "<backend>"}}
        self._put_behind(layers)
        self.loadables["backend"] = "backend"

    def _put_behind(self, layers):
        """Puts layers behind the network, by a container of SpeechBrain's.

        It takes the lengths that SpeechBrain hands over, and hands them to
        those parts that take them.
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
        # SpeechBrain loads no folder without this file: it goes first and
        # comes last, so that a crash leaves no mixture of two exports.
        # An earlier export's files would be of other weights than this one's.
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
        given = {} if threshold is None else {"threshold": threshold}
        text += f"\n{dump_settings({**given, **self.parts})}"
        text += FIXED_PART.format(label_encoder=label_encoder)
        text += "".join(
            f"        {n}: !ref <{to}>\n" for n, to in loadables.items()
        )
        # A user's encoder.onnx takes minutes: of the same encoder it stays.
        if before != {**_contents(folder), YAML: text}:
            (folder / ONNX).unlink(missing_ok=True)
        with atomic_write(folder / "README.md") as out:
            out.write(card)
        with atomic_write(folder / YAML) as out:
            out.write(text)
        # Found without labels, it lies within 0.1 of what labels would give.
        found = "not found" if threshold is None else f"{threshold:.2f}"
        logger.info("Exported to %s, threshold %s", folder, found)


def check_target(folder: PathLike, run: PathLike | None = None) -> None:
    """Raises FileExistsError if an export would replace files of others.

    For example, a project would lose its README.md. A `run` may write its own
    exports again.
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
            continue  # none, or another program's
        step = target.relative_to(owner).as_posix()
        mine = owner == own and step.startswith("export/")
        if step == "." or step in state["done"] and not mine:
            raise FileExistsError(
                f"{folder} is of the run {owner}, whose files would be "
                "replaced: name another folder"
            )
        break
    # A recording that was added to an exported folder is its example.
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
    """Reads a state dict, without what wrappers put before the names."""
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
    """Returns what tells one export of an encoder from another, by file."""
    weights = (folder / name for name in (ENCODER, AFFINE))
    found = {path.name: checksum(path) for path in weights if path.exists()}
    yaml = folder / YAML
    return {**found, YAML: yaml.read_text("utf-8") if yaml.exists() else ""}


def _instance(setting):
    """Returns tag and arguments of the instance that a `!name:` makes.

    A list of arguments gets their names, by which others can be added.
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
    """Says whether a network's class takes lengths behind features."""
    network = pydoc.locate(tag.partition(":")[2])
    try:
        inspect.signature(network.forward).bind("self", "features", "lengths")
    except TypeError:
        return False
    return True
