"""Pre-trained speech models from a folder, the hub or a configuration.

transformers is imported when it is needed: the package works without it.
"""

from typing import Any

import torch

FAMILIES = ("wavlm", "hubert", "wav2vec2", "wav2vec2-bert")


def _transformers():
    """Returns the package, or says how to install it."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"a pre-trained speech model takes transformers ({error}): "
            "pip install transformers"
        ) from error
    return transformers


def read_config(source: str | dict) -> Any:
    """Returns a source's configuration, of a family that is known here."""
    auto = _transformers().AutoConfig
    try:
        if isinstance(source, dict):
            config = auto.for_model(**source)
        else:
            config = auto.from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{source} is no speech model: name a folder that save_pretrained "
            f"wrote, or a model at Hugging Face: {error}"
        ) from error
    if config.model_type not in FAMILIES or getattr(
        config, "add_adapter", False
    ):
        raise ValueError(
            f"{source} is a {config.model_type}, which is none of "
            f"{', '.join(FAMILIES)}, or has an adapter behind its layers"
        )
    return config


def read_model(source: str | dict) -> tuple[Any, bool]:
    """Returns a source's model, float32, and whether it was normalised for."""
    transformers = _transformers()
    # A bar for each of many readings of one file.
    transformers.utils.logging.disable_progress_bar()
    if isinstance(source, dict):
        config = read_config(source)
        return transformers.AutoModel.from_config(config).float(), False
    try:
        model, info = transformers.AutoModel.from_pretrained(
            source, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{source} cannot be loaded: {error}") from error
    missing = {*info["missing_keys"]}
    # The vector for masked frames is of pre-training alone. Where a source
    # lacks it, some versions leave it to chance, and a checkpoint would find
    # other frozen weights than its own.
    if "masked_spec_embed" in missing:
        torch.nn.init.zeros_(model.masked_spec_embed)
        missing.remove("masked_spec_embed")
    if missing:
        raise ValueError(
            f"{source} lacks weights, such as {min(missing)}, which would "
            "be random"
        )
    return model.float(), bool(_told(source).get("do_normalize", False))


def read_sample_rate(source: str | dict) -> int:
    """Returns the sampling rate in Hz that a source was trained with."""
    told = {} if isinstance(source, dict) else _told(source)
    return told.get("sampling_rate", 16000)


def _told(source):
    """Returns what a source's preprocessor_config.json says, if it has one."""
    reader = _transformers().Wav2Vec2FeatureExtractor
    try:
        return reader.get_feature_extractor_dict(source)[0]
    except OSError:
        return {}
