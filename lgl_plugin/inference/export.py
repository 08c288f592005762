"""Exports a trained encoder as a folder that SpeechBrain alone loads.

> lgl export results/lgl/1
> lgl export results/lgl/1 iter1/classifier --output=mine
> lgl export encoder.ckpt --yaml=mine.yaml --output=mine

The folder holds `hyperparams.yaml`, `embedding_model.ckpt` and a model card,
`README.md`; with a back-end `backend.ckpt`, else in Stage II the classifier.
SpeechBrain's `SpeakerRecognition` and `EncoderClassifier` take the folder as
`source`. SpeechBrain's verification script takes it as `pretrain_path`, without
the back-end. The folder has the form of a repository at Hugging Face.
"""

import dataclasses
import os
import pathlib
import re

import numpy as np
import torch
from speechbrain.utils.logger import get_logger

from lgl_plugin.dataio.audio import BadAudio
from lgl_plugin.dataio.labels import LABELS, labelled_rows, read_labels
from lgl_plugin.dataio.manifest import (
    Manifest,
    held_out,
    manifest_path,
    run_manifest,
)
from lgl_plugin.inference.backends import load_backend
from lgl_plugin.inference.calibration import find_threshold
from lgl_plugin.inference.inference_model import InferenceModel, check_target
from lgl_plugin.inference.model_card import (
    last_name,
    model_card,
    pretrained_card,
)
from lgl_plugin.inference.onnx_export import ONNX, export_onnx
from lgl_plugin.runs.metrics_log import read_metrics, summarise
from lgl_plugin.runs.pretrained import YAML, PathLike
from lgl_plugin.runs.run import encoder_kind, encoder_steps, round_of, stage_of
from lgl_plugin.runs.state import check_artefact, read_state, refuse_adaptation
from lgl_plugin.runs.weights import BACKEND, CLASSIFIER, ENCODER
from lgl_plugin.utils.distributed import from_main
from lgl_plugin.utils.files import check_writable, checksum

logger = get_logger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainedStep:
    """A step of a run that wrote an encoder, such as "iter2/gated".

    `short_name` is the name of its exported folder. `settings` are those of
    the stages that have trained the encoder, by stage. `manifest` is the
    training's, None if its file is missing, and `labelled` are its rows, int64,
    that a user had labelled. `pseudo` are Stage II's utterances and
    pseudo-labels.
    """

    name: str
    short_name: str
    settings: dict
    model: InferenceModel
    manifest: Manifest | None
    labelled: np.ndarray
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
    manifest: PathLike | None = None,
) -> dict[str, float | None]:
    """Exports an encoder of a run.

    Arguments
    ---------
    run : str or pathlib.Path
        The run folder.
    step : str, optional
        "stage1", "ssps" or "iter2/gated"; "iter2" for that round's latest; or
        a folder below the run's with an encoder. By default the latest of all.
    folder : str or pathlib.Path, optional
        Where to write. By default `<run>/export/iter2` for a round's latest
        encoder, `<run>/export/iter2-classifier` for its other encoder. With a
        threshold, licence or back-end of your own, "-custom" is added, because
        training may replace the plain folder.
    device : str
        Where utterances are embedded to find the threshold.
    data_folder : str, optional
        The present folder of the run's audio, if it has moved.
    threshold : float, optional
        The threshold of the cosine. By default found without labels.
    licence : str
        The licence of the weights, as Hugging Face names it.
    backend : bool, optional
        Whether the back-end that was fitted at the step's end becomes part of
        the model. By default the yaml's `backend` decides: whitening lowers
        the error of some encoders and raises that of others, and without
        labels nothing tells them apart. With a back-end the classifier, which
        works on the bare embeddings, is left out.
    onnx : bool
        Whether the folder gets `encoder.onnx`, too.
    manifest : str or pathlib.Path, optional
        The present path of the user's own list of utterances, if it has moved.

    Returns
    -------
    dict
        The "threshold", None if none could be found.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no run or no such step; if the folder is that of an
        `lgl adapt`; if the weights are damaged or do not fit the settings; if
        the list of utterances is not the one that the run was trained on. If
        no threshold is given, also if that list is missing or no utterance can
        be read.
    FileExistsError
        If the folder is not of an export and holds recordings, other folders,
        a README.md or a hyperparams.yaml; or if it is of another run.

    Example
    -------
    >>> export("results/lgl/1", "iter2", "mine")  # doctest: +SKIP
    {'threshold': 0.38}
    """
    run = pathlib.Path(run)
    places = data_folder, manifest
    source = read_trained_step(run, step, backend, *places, threshold is None)
    custom = threshold is not None or licence != "other" or backend is not None
    name = source.short_name + ("-custom" if custom else "")
    folder = folder or run / "export" / name
    check_target(folder, run)  # before the search for a threshold
    if custom and (pathlib.Path(folder) / YAML).exists():
        logger.warning(
            "%s is replaced: what an earlier export was given, such as a "
            "licence, is not kept unless it is given again",
            folder,
        )
    from_main(check_writable, folder)
    model, utterances = source.model, source.manifest
    share, seed = (model.settings[k] for k in ("held_out_share", "seed"))
    decision = None if threshold is None else (threshold, "given")
    mean = None
    if threshold is None and utterances is not None:
        extract = model.extractor(device)
        try:
            decision, vectors = find_threshold(
                *(extract, utterances, share, seed),
                *(source.pseudo, source.labelled),
            )
        except BadAudio as error:
            raise ValueError(
                f"no threshold can be found: {error}. If the audio has moved, "
                "say where by --data_folder; or give a --threshold."
            ) from error
        mean = torch.from_numpy(vectors.mean(axis=0))
        threshold = decision[0] if decision else None
    data = None
    if utterances is not None:
        number = len(utterances)
        data = {
            "name": last_name(model.settings["data_folder"]),
            "utterances": number,
            "held_out": len(held_out(number, share, seed, source.labelled)[1]),
            "hours": float(utterances.durations.sum()) / 3600,
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
    # By `from_main`, so that all processes raise on a full disk: one that went
    # on to the next collective call alone would hang the training.
    from_main(model.save, folder, card, threshold, mean)
    if onnx:
        from_main(export_onnx, folder, pathlib.Path(folder) / ONNX)
    return {"threshold": threshold}


def read_trained_step(
    run: PathLike,
    step: str | None = None,
    backend: bool | None = False,
    data_folder: str | None = None,
    manifest: PathLike | None = None,
    needs_audio: bool = True,
) -> TrainedStep:
    """Reads a step of a run; arguments and errors are those of `export`.

    If `needs_audio` is False, the list of utterances may be missing.
    """
    run = pathlib.Path(run)
    refuse_adaptation(run)
    state = read_state(run)
    steps = encoder_steps(run, state)
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
    place, iteration, stage = step.split("/")[0], round_of(step), stage_of(step)
    chosen = state["settings"][stage]
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
        encoder_kind(chosen, iteration),
        fitted,
    )
    if manifest:
        chosen = {**chosen, "manifest": os.fspath(manifest)}
    try:
        listed = manifest_path(run, chosen)
    except FileNotFoundError:
        if manifest or needs_audio:
            raise
        utterances, labelled = None, np.empty(0, np.int64)
    else:
        before = state["inputs"].get(stage, {}).get("manifest")
        if before not in (None, checksum(listed)):
            raise ValueError(
                f"manifest: {listed} is not the list that {run} was trained on"
            )
        utterances = run_manifest(run, chosen, data_folder)
        labelled = labelled_rows(run / place / "labels", utterances)
    labels = run / place / "labels" / LABELS
    latest = [name for name in steps if name.split("/")[0] == place][-1:]
    settings = sorted(state["settings"].items())
    return TrainedStep(
        name=step,
        short_name=place if [step] == latest else step.replace("/", "-"),
        settings={name: value for name, value in settings if name <= stage},
        model=model,
        manifest=utterances,
        labelled=labelled,
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
        A state dict, also of a module wrapped by DistributedDataParallel or
        torch.compile.
    settings : dict
        A yaml of the recipe, as `plain_settings` reads it; or the result of
        `encoder_settings`, for weights that describe their network.
    folder, threshold, licence
        As of `export`. By default the folder has no threshold.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such checkpoint, or it fits no encoder of the yaml.

    Example
    -------
    >>> from speechbrain.lobes.models.Xvector import Xvector
    >>> from lgl_plugin.runs.plain import plain_settings
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
    check_target(folder)
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
