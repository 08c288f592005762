"""Finds the settings of an encoder on disk: a SpeechBrain folder, or CAM++.

The settings are plain data, in the form of a recipe's yaml: `new_encoder`, an
`Encoder` by `!name:`, and `sample_rate`.
"""

import contextlib
import pathlib
from typing import Any

import torch
from hyperpyyaml import load_hyperpyyaml, resolve_references

from lgl_plugin.runs.plain import dump_settings, plain_settings
from lgl_plugin.runs.state import STATE, is_adaptation, nothing_kept
from lgl_plugin.runs.weights import AFFINE, ENCODER, read_tensors

PathLike = str | pathlib.Path
PARTS = ("compute_features", "mean_var_norm", "embedding_model")
YAML = "hyperparams.yaml"
ENCODER_TAG = "!name:lgl_plugin.nnet.encoders.Encoder"

CAMPPLUS = """
compute_features: !new:lgl_plugin.nnet.features.KaldiFbank
    n_mels: {bands}
mean_var_norm: !new:speechbrain.processing.features.InputNormalization
    norm_type: sentence
    std_norm: false
embedding_model: !new:lgl_plugin.nnet.campplus.CAMPPlus
    feat_dim: {bands}
    embedding_size: {size}
    growth_rate: {growth}
    bn_size: {inside}
    init_channels: {channels}
"""


def encoder_settings(source: PathLike, bare: bool = False) -> dict | None:
    """Returns the `sample_rate` and `new_encoder` that describe an encoder.

    The source is a folder with `hyperparams.yaml`, whose `modules` name
    compute_features, embedding_model and, if there is one, mean_var_norm; or a
    file with a state dict of CAM++. Returns None if the source has only
    weights. Raises ValueError for an invalid yaml. `bare` leaves out the
    back-end that an exported folder may have: then `embedding_model.ckpt` has
    all weights.
    """
    source = pathlib.Path(source)
    rate, loadables = 16000, {}
    if source.is_dir() and (source / YAML).is_file():
        text = (source / YAML).read_text(encoding="utf-8")
        try:
            settings = plain_settings(resolve_references(text).getvalue())
        except Exception as error:  # HyperPyYAML raises many types
            raise ValueError(f"{source / YAML}: {error}") from error
        modules = settings.get("modules")
        # A recipe's own yaml, as a run keeps it, has no such modules.
        if not isinstance(modules, dict) or not {*PARTS[::2]} <= {*modules}:
            return None
        rate = settings.get("sample_rate", rate)
        for arguments in (settings.get("pretrainer") or {}).values():
            loadables = arguments.get("loadables", {})
    elif source.is_file() and (sizes := _campplus_sizes(source)):
        modules = plain_settings(CAMPPLUS.format(**sizes))
    else:
        return None
    features, normalise, network = (modules.get(name) for name in PARTS)
    if bare:
        network = loadables.get(PARTS[2], network)
    parts = {"features": features, "normalise": normalise, "network": network}
    factories = {
        name: {tag.replace("!new:", "!name:", 1): arguments}
        for name, part in parts.items()
        if part
        for tag, arguments in part.items()
    }
    return {"sample_rate": rate, "new_encoder": {ENCODER_TAG: factories}}


def names_campplus(new_encoder: Any) -> bool:
    """Says whether a yaml's `new_encoder`, as plain data, is a CAM++."""
    for name in (ENCODER_TAG, "network"):
        new_encoder = isinstance(new_encoder, dict) and new_encoder.get(name)
    tags = new_encoder if isinstance(new_encoder, dict) else {}
    return any(tag.endswith(".campplus.CAMPPlus") for tag in tags)


def encoder_files(source: PathLike) -> dict[str, pathlib.Path]:
    """Returns the files of an encoder, by their names in an exported folder."""
    source = pathlib.Path(source)
    if source.is_file():
        return {ENCODER: source}
    names = (ENCODER, AFFINE, YAML)
    return {n: source / n for n in names if (source / n).exists()}


def where_encoder_is(folder: PathLike) -> str:
    """Advises on a folder that is no encoder's.

    The folder of a run or of an `lgl adapt` has encoders below it.
    """
    folder = pathlib.Path(folder)
    # A run's own steps have both files too, but only exports can be loaded.
    for place in (folder / "export", folder):
        below = [
            path.parent
            for path in sorted(place.glob(f"*/{YAML}"))
            if (path.parent / ENCODER).is_file()
        ]
        if below:
            break
    if below:
        return f"Name an encoder below it: {', '.join(map(str, below))}"
    with contextlib.suppress(ValueError):  # another program's state.json
        if is_adaptation(folder):
            return nothing_kept(folder)
    run = folder if (folder / STATE).is_file() else "RUN"
    return f"`lgl export {run}` writes one to {run}/export"


def build_encoder(settings: dict) -> torch.nn.Module:
    """Makes an encoder with random weights from its settings."""
    return made(settings["new_encoder"])()


def made(setting: Any) -> Any:
    """Makes the object of a setting, such as a module or its factory."""
    return load_hyperpyyaml(dump_settings({"made": setting}))["made"]


@torch.no_grad()
def embedding_size(settings: dict) -> int:
    """Returns how many dimensions an encoder's embeddings have."""
    second = torch.randn(1, settings["sample_rate"]) / 9
    return build_encoder(settings).eval()(second).shape[1]


def _campplus_sizes(path):
    """Returns the sizes of a CAM++ from its weights; None for other files."""
    try:
        weights = read_tensors(path)
        entry = weights["xvector.tdnn.linear.weight"]
        layer = "xvector.block1.tdnnd1."
        local = weights[f"{layer}cam_layer.linear_local.weight"]
        return {
            "bands": entry.shape[1] // 4,  # 32 channels of an eighth of these
            "channels": entry.shape[0],
            "growth": local.shape[0],
            "inside": local.shape[1] // local.shape[0],
            "size": weights["xvector.dense.linear.weight"].shape[0],
        }
    except Exception:  # torch's unpickler raises many types
        return None
