"""Loads pre-trained speech models from a folder, the hub or a configuration.

The module imports transformers only on use: the package works without it.
"""

from typing import Any

import torch

FAMILIES = ("wavlm", "hubert", "wav2vec2", "wav2vec2-bert")


def _transformers():
    """Imports transformers; ValueError says how to install the package."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"a pre-trained speech model takes transformers ({error}): "
            "pip install transformers"
        ) from error
    return transformers


def read_config(source: str | dict) -> Any:
    """Returns a source's configuration; ValueError if its family is unknown."""
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
            f"{', '.join(FAMILIES)}, or has an adapter after its layers"
        )
    return config


def read_model(source: str | dict) -> tuple[Any, bool]:
    """Returns a source's model, float32, and if it takes normalised audio."""
    transformers = _transformers()
    # A run loads the same file many times: each load would print a progress
    # bar.
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
    # Only pre-training uses the vector for masked frames. If a source lacks
    # this vector, some versions of transformers draw it at random. A resumed
    # run would then have other frozen weights than its checkpoint.
    if "masked_spec_embed" in missing:
        torch.nn.init.zeros_(model.masked_spec_embed)
        missing.remove("masked_spec_embed")
    if missing:
        raise ValueError(
            f"{source} lacks weights, such as {min(missing)}, which would "
            "be random"
        )
    return model.float(), bool(
        _preprocessor_config(source).get("do_normalize", False)
    )


def read_sample_rate(source: str | dict) -> int:
    """Returns the sampling rate in Hz that a source was trained with."""
    config = {} if isinstance(source, dict) else _preprocessor_config(source)
    return config.get("sampling_rate", 16000)


def _preprocessor_config(source):
    """Returns a source's preprocessor_config.json; {} without that file."""
    reader = _transformers().Wav2Vec2FeatureExtractor
    try:
        return reader.get_feature_extractor_dict(source)[0]
    except OSError:
        return {}
