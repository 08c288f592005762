"""A run's settings."""

import json
import math

import yaml
from speechbrain.utils.logger import get_logger

logger = get_logger(__name__)


def flatten(settings, prefix=""):
    """Nested settings as rows of key and value.

    Arguments
    ---------
    settings : dict
        A stage's, as `run_folder.plain_settings` reads them.
    prefix : str
        Of the keys.

    Yields
    ------
    (str, str)
        A yaml tag is its key's value, its arguments are keys below it.
        SpeechBrain's own keys, which begin with two underscores, are left out.

    Example
    -------
    >>> gate = {"!new:lgl_plugin.nnet.gates.FixedGate": {"tau": 1}}
    >>> list(flatten({"lr": 0.1, "gate": gate}))
    [('lr', '0.1'), ('gate', 'lgl_plugin...FixedGate'), ('gate.tau', '1')]
    """
    for key, value in settings.items():
        if str(key).startswith("__"):
            continue
        name = f"{prefix}{key}"
        if isinstance(value, dict) and len(value) == 1:
            tag = str(next(iter(value)))
            if tag.startswith("!"):
                yield name, tag.split(":", 1)[-1]
                (value,) = value.values()
                if value == "":
                    continue
        if isinstance(value, dict):
            yield from flatten(value, f"{name}.")
        else:
            plain = isinstance(value, str)
            yield name, value if plain else json.dumps(value, default=str)


def plain_settings(text):
    """What a yaml says, as plain data: its tags too, but no comments.

    Arguments
    ---------
    text : str
        A HyperPyYAML text with its references resolved.

    Returns
    -------
    dict
        All but output_folder, train_logger and max_bad_share: a run that
        was moved, is watched otherwise or bears more bad files is the same.

    Example
    -------
    >>> plain_settings("gate: !new:lgl_plugin.nnet.gates.FixedGate {tau: 1}")
    {'gate': {'!new:lgl_plugin.nnet.gates.FixedGate': {'tau': 1}}}
    """

    class Loader(yaml.SafeLoader):
        """Reads a tagged node as {tag: value}."""

    def construct(loader, tag, node):
        if isinstance(node, yaml.MappingNode):
            return {"!" + tag: loader.construct_mapping(node, deep=True)}
        if isinstance(node, yaml.SequenceNode):
            return {"!" + tag: loader.construct_sequence(node, deep=True)}
        return {"!" + tag: loader.construct_scalar(node)}

    def number(loader, node):
        value = loader.construct_yaml_float(node)
        # JSON knows no other.
        return value if math.isfinite(value) else node.value

    Loader.add_multi_constructor("!", construct)
    Loader.add_constructor("tag:yaml.org,2002:float", number)
    settings = yaml.load(text, Loader) or {}  # noqa: S506, it is a SafeLoader
    for key in ("output_folder", "train_logger", "max_bad_share"):
        settings.pop(key, None)
    return settings
