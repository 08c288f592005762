"""A trained encoder as a folder that SpeechBrain alone loads.

> lgl export results/lgl/1
> lgl export results/lgl/1 iter1/classifier --output=mine
> lgl export encoder.ckpt --yaml=mine.yaml --output=mine

The folder holds `hyperparams.yaml`, `embedding_model.ckpt`, in Stage II the
classifier, and a model card, `README.md`. SpeechBrain's `SpeakerRecognition`
and `EncoderClassifier` take it as `source`, its verification script takes it
as `pretrain_path`, and it has the form of a repository at Hugging Face.
"""

import dataclasses
import io
import pathlib
import re

import torch
import yaml
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.distributed import main_process_only
from speechbrain.utils.logger import get_logger

from lgl_plugin.dataio.audio import BadAudio
from lgl_plugin.dataio.labels import read_labels
from lgl_plugin.dataio.manifest import Manifest, held_out, load_manifest
from lgl_plugin.inference.calibration import find_threshold
from lgl_plugin.inference.extractor import Extractor
from lgl_plugin.inference.model_card import last_name, model_card
from lgl_plugin.runs.metrics_log import read_metrics, summarise
from lgl_plugin.runs.state import check_artefact, read_state
from lgl_plugin.utils.files import atomic_write

logger = get_logger(__name__)

ENCODER, CLASSIFIER = "embedding_model.ckpt", "classifier.ckpt"
MEAN, NAMES = "mean_var_norm_emb.ckpt", "label_encoder.ckpt"
# What data parallelism and torch.compile put before a weight's name.
WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod)\.)+")

CLASSIFY = "!new:speechbrain.lobes.models.ECAPA_TDNN.Classifier"
EMBEDDING_NORM = "!new:speechbrain.processing.features.InputNormalization"
AUDIO_NORM = "!new:speechbrain.dataio.preprocess.AudioNormalizer"
LABEL_ENCODER = "!new:speechbrain.dataio.encoder.CategoricalEncoder"
PRETRAINER = "!new:speechbrain.utils.parameter_transfer.Pretrainer"


class Model:
    """Trained weights with what SpeechBrain needs to build the modules.

    Arguments
    ---------
    settings : dict
        A stage's, as `run_folder.plain_settings` reads them.
    encoder : str or pathlib.Path
        A state dict of the encoder.
    classifier : str or pathlib.Path, optional
        A state dict of the classifier, of Stage II.
    kind : str
        The setting that says how to build the encoder.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the encoder's weights do not fit the settings.

    Example
    -------
    >>> from speechbrain.lobes.models.Xvector import Xvector
    >>> settings = plain_settings('''
    ... sample_rate: 16000
    ... compute_features: !new:speechbrain.lobes.features.Fbank {n_mels: 24}
    ... mean_var_norm: !new:speechbrain.processing.features.InputNormalization
    ... new_encoder: !name:speechbrain.lobes.models.Xvector.Xvector
    ...     in_channels: 24
    ... ''')
    >>> path = getfixture("tmp_path") / "xvector.ckpt"
    >>> torch.save(Xvector(in_channels=24).state_dict(), path)
    >>> model = Model(settings, path)
    >>> model.save(path.parent / "mine", "# My model", threshold=0.5)
    >>> sorted(file.name for file in (path.parent / "mine").iterdir())
    ['README.md', 'embedding_model.ckpt', 'hyperparams.yaml']
    """

    def __init__(self, settings, encoder, classifier=None, kind="new_encoder"):
        self.settings = settings
        self.n_classes = 0
        self.encoder = _read_weights(encoder)
        self.classifier = None
        tag, arguments = _instance(settings[kind])
        self.encoder_class = tag.rpartition(".")[2]
        self.parts = {
            "sample_rate": settings["sample_rate"],
            "compute_features": settings["compute_features"],
            "mean_var_norm": settings["mean_var_norm"],
            "embedding_model": {tag: arguments},
            # EncoderClassifier asks for one. Without weights it is no use.
            "classifier": {CLASSIFY: {"input_size": 1, "out_neurons": 1}},
        }
        if classifier is not None:
            self._add_classifier(_read_weights(classifier))
        built = load_hyperpyyaml(_dump(self.parts))
        try:
            built["embedding_model"].load_state_dict(self.encoder)
        except RuntimeError as error:
            first = str(error).strip().splitlines()[:2]
            raise ValueError(
                f"{encoder} does not fit the {self.encoder_class} of "
                f"{kind} (another width, or not an encoder): {' '.join(first)}"
            ) from error
        self.built = built

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
            tag, arguments = CLASSIFY, {"input_size": centres.shape[-1]}
        outputs = len(weights["weight"])
        self.classifier = weights
        self.parts["classifier"] = {tag: {**arguments, "out_neurons": outputs}}

    def extractor(self, device="cpu"):
        """An Extractor around the encoder."""
        loader = self.settings.get("dataloader_options", {})
        return Extractor(
            self.built["compute_features"],
            self.built["mean_var_norm"],
            self.built["embedding_model"],
            device,
            self.settings["sample_rate"],
            num_workers=loader.get("num_workers", 0),
        )

    @main_process_only
    def save(self, folder, card, threshold=None, mean=None):
        """Writes the folder.

        Arguments
        ---------
        folder : str or pathlib.Path
            Made if it is missing; files of an earlier export are replaced.
        card : str
            The model card.
        threshold : float, optional
            Of the cosine.
        mean : torch.Tensor, optional
            Mean embedding (dim,), which `encode_batch(..., normalize=True)`
            takes away.
        """
        folder = pathlib.Path(folder)
        # What makes the folder a model goes first and comes last.
        (folder / "hyperparams.yaml").unlink(missing_ok=True)
        _write_torch(folder / ENCODER, self.encoder)
        loadables = ["embedding_model"]
        parts = {
            **self.parts,
            "mean_var_norm_emb": {
                EMBEDDING_NORM: {"norm_type": "global", "std_norm": False}
            },
        }
        modules = [name for name in parts if name != "sample_rate"]
        parts["audio_normalizer"] = {
            AUDIO_NORM: {"sample_rate": _ref("sample_rate")}
        }
        header = "# A speaker encoder, see README.md.\n"
        if threshold is not None:
            parts = {"threshold": threshold, **parts}
        if mean is not None:
            # As InputNormalization keeps its statistics.
            statistics = {"glob_mean": mean, "glob_std": torch.ones_like(mean)}
            _write_torch(folder / MEAN, {"count": 1, **statistics})
            loadables.append("mean_var_norm_emb")
        if self.classifier is None:
            header += "# The classifier has no weights, as there is none yet.\n"
        else:
            _write_torch(folder / CLASSIFIER, self.classifier)
            self._write_names(folder / NAMES)
            loadables += ["classifier", "label_encoder"]
            parts["label_encoder"] = {LABEL_ENCODER: {}}
        parts["modules"] = {name: _ref(name) for name in modules}
        parts["pretrainer"] = {
            PRETRAINER: {"loadables": {name: _ref(name) for name in loadables}}
        }
        with atomic_write(folder / "README.md") as out:
            out.write(card)
        with atomic_write(folder / "hyperparams.yaml") as out:
            out.write(f"{header}\n{_dump(parts)}")
        logger.info("Exported to %s, threshold %s", folder, threshold)

    def _write_names(self, path):
        """What SpeechBrain's CategoricalEncoder calls the outputs."""
        with atomic_write(path) as out:
            for output in range(len(self.classifier["weight"])):
                number = output % self.n_classes
                out.write(f"'pseudo-speaker {number}' => {output}\n")
            out.write("================\n'starting_index' => 0\n")


def export(
    run,
    step=None,
    folder=None,
    device="cpu",
    data_folder=None,
    threshold=None,
    licence="other",
):
    """Exports an encoder of a run.

    Arguments
    ---------
    run : str or pathlib.Path
        The run folder.
    step : str, optional
        The step that left the encoder, such as "stage1" or "iter2/gated";
        "iter2" for that round's latest; or another folder below the run's
        that holds one, such as a checkpoint's. The latest of all, if not
        given.
    folder : str or pathlib.Path, optional
        Where to write. In `<run>/export`, if not given: `stage1`, `iter2` for
        that round's latest encoder, `iter2-classifier` for another of it.
    device : str
        Where utterances are embedded to find the threshold.
    data_folder : str, optional
        Where the run's audio is now, if it is not where it was.
    threshold : float, optional
        Of the cosine; found without labels if it is not given.
    licence : str
        Of the weights, as Hugging Face names it.

    Returns
    -------
    dict
        The "threshold", None if none could be found.

    Raises
    ------
    FileNotFoundError
        If there is no run or no such step.
    ValueError
        If the weights were damaged or do not fit the run's settings, or no
        utterance can be read.
    """
    run = pathlib.Path(run)
    source = read_step(run, step, data_folder)
    chosen, model, manifest = source.chosen, source.model, source.manifest
    decision, mean = (threshold, "given"), None
    if threshold is None:
        try:
            decision, vectors = source.find_threshold(device)
        except BadAudio as error:
            raise ValueError(
                f"no threshold can be found: {error}. If the audio has moved, "
                "say where by --data_folder; or give a --threshold."
            ) from error
        mean = torch.from_numpy(vectors.mean(axis=0))
    aside = held_out(len(manifest), chosen["held_out_share"], chosen["seed"])[1]
    data = {
        "name": last_name(chosen["data_folder"]),
        "utterances": len(manifest),
        "held_out": len(aside),
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
    )
    found = decision[0] if decision else None
    model.save(folder or run / "export" / source.short_name, card, found, mean)
    return {"threshold": found}


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of a run that left an encoder.

    Arguments
    ---------
    name : str
        Such as "iter2/gated".
    short_name : str
        Of its exported folder.
    settings : dict
        By stage, those that the encoder has passed.
    model : Model
        Its weights.
    manifest : lgl_plugin.dataio.manifest.Manifest
        What it was trained on.
    pseudo : (Strings, numpy.ndarray) or None
        Utterances and pseudo-labels, in Stage II.
    """

    name: str
    short_name: str
    settings: dict
    model: Model
    manifest: Manifest
    pseudo: tuple | None

    @property
    def chosen(self):
        """The settings of the step's own stage."""
        return self.model.settings

    def find_threshold(self, device="cpu"):
        """What `threshold.find_threshold` returns."""
        share, seed = self.chosen["held_out_share"], self.chosen["seed"]
        extract = self.model.extractor(device)
        return find_threshold(extract, self.manifest, share, seed, self.pseudo)


def read_step(run, step=None, data_folder=None):
    """Reads what a step of a run has left, see `export`.

    Returns
    -------
    Step
    """
    run = pathlib.Path(run)
    settings, steps = _read_run(run)
    step = pathlib.PurePath(step or "").as_posix()
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
    chosen = settings[stage]
    wide = iteration == chosen.get("n_iterations")
    wide = wide and chosen.get("new_last_encoder")
    model = Model(
        chosen,
        encoder,
        encoder.with_name(CLASSIFIER) if iteration else None,
        "new_last_encoder" if wide else "new_encoder",
    )
    manifest = load_manifest(
        chosen["manifest"] or run / "manifest.csv",
        data_folder or chosen["data_folder"],
        chosen.get("allow_outside_data_folder", False),
    )
    labels = run / place / "labels" / "labels.csv"
    latest = [name for name in steps if name.split("/")[0] == place][-1:]
    return Step(
        name=step,
        short_name=place if [step] == latest else step.replace("/", "-"),
        settings={key: settings[key] for key in settings if key <= stage},
        model=model,
        manifest=manifest,
        pseudo=read_labels(labels) if iteration else None,
    )


def export_checkpoint(
    encoder, settings, folder, threshold=None, licence="other"
):
    """Exports a checkpoint that belongs to no run.

    Arguments
    ---------
    encoder : str or pathlib.Path
        A state dict of the encoder; what data parallelism or torch.compile
        put before the names is taken off.
    settings : dict
        A yaml of the recipe, as `run_folder.plain_settings` reads it.
    folder : str or pathlib.Path
        Where to write.
    threshold : float, optional
        Of the cosine, if one is known.
    licence : str
        Of the weights, as Hugging Face names it.

    Raises
    ------
    FileNotFoundError
        If there is no such checkpoint.
    ValueError
        If it fits no encoder of the yaml.

    Example
    -------
    >>> from speechbrain.lobes.models.Xvector import Xvector
    >>> settings = plain_settings('''
    ... stage: 1
    ... sample_rate: 16000
    ... compute_features: !new:speechbrain.lobes.features.Fbank {n_mels: 24}
    ... mean_var_norm: !new:speechbrain.processing.features.InputNormalization
    ... new_encoder: !name:speechbrain.lobes.models.Xvector.Xvector
    ...     in_channels: 24
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
            model = Model(settings, encoder, kind=kind)
            break
        except ValueError:
            if kind == kinds[-1]:
                raise
    decision = None if threshold is None else (threshold, "given")
    card = model_card(
        {f"stage {settings['stage']}": settings},
        model.encoder_class,
        decision=decision,
        licence=licence,
    )
    model.save(folder, card, threshold)


def _read_run(run):
    """A run's settings, by stage, and the steps that left an encoder."""
    if not (run / "state.json").exists():
        raise FileNotFoundError(
            f"{run} holds no state.json: is it the output_folder of a run? "
            "A checkpoint of no run takes --yaml."
        )
    state = read_state(run)
    there = [step for step in state["done"] if (run / step / ENCODER).exists()]
    steps = [step for step in there if not step.startswith("export")]
    return dict(sorted(state["settings"].items())), steps


def _read_weights(path):
    """A state dict without what wrappers put before the names."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        if not all(
            isinstance(value, torch.Tensor) for value in weights.values()
        ):
            raise TypeError("it holds more than tensors")
        return {
            WRAPPERS.sub("", name): value for name, value in weights.items()
        }
    except Exception as error:  # torch raises what its unpickler does
        said = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"{path} is no state dict: {said[0]}") from error


def _write_torch(path, value):
    """Writes what torch.load reads, atomically."""
    whole = io.BytesIO()  # torch hides from the file that a disk is full
    torch.save(value, whole)
    with atomic_write(path, "wb") as out:
        out.write(whole.getbuffer())


def _ref(name):
    return {"!ref": f"<{name}>"}


def _instance(setting):
    """Tag and arguments of the instance that a `!name:` setting makes."""
    ((tag, arguments),) = setting.items()
    return tag.replace("!name:", "!new:", 1), arguments or {}


class _Dumper(yaml.SafeDumper):
    """Writes {tag: value}, as `run_folder.plain_settings` reads tags."""

    def ignore_aliases(self, data):
        return True


def _represent_dict(dumper, value):
    if len(value) == 1:
        ((tag, inner),) = value.items()
        if str(tag).startswith("!"):
            if isinstance(inner, list):
                return dumper.represent_sequence(tag, inner)
            if isinstance(inner, dict):
                return dumper.represent_mapping(tag, inner)
            return dumper.represent_scalar(tag, str(inner))
    return dumper.represent_mapping("tag:yaml.org,2002:map", value.items())


def _represent_list(dumper, value):
    tag = "tag:yaml.org,2002:seq"
    return dumper.represent_sequence(tag, value, flow_style=True)


_Dumper.add_representer(dict, _represent_dict)
_Dumper.add_representer(list, _represent_list)


def _dump(parts):
    """A HyperPyYAML text of settings, in their order."""
    texts = [
        yaml.dump({key: value}, Dumper=_Dumper, sort_keys=False, indent=4)
        for key, value in parts.items()
    ]
    return re.sub(r"!ref '(<\w+>)'", r"!ref \1", "\n".join(texts))
