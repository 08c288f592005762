"""Converts HyperPyYAML text to plain data and back; no object is made."""

import math
import pathlib
from typing import Any

import ruamel.yaml
import yaml


def plain_settings(text: str) -> dict:
    """Reads a resolved HyperPyYAML text as plain data, making no object.

    A tagged entry is a dict of its tag, exclamation mark included, and its
    arguments: {"!new:lgl_plugin.nnet.gates.FixedGate": {"tau": 1}}.
    """

    class Constructor(ruamel.yaml.constructor.SafeConstructor):
        """Reads a tagged node as {tag: value}."""

    def construct(constructor, tag, node):
        if isinstance(node, ruamel.yaml.MappingNode):
            value = constructor.construct_mapping(node, deep=True)
        elif isinstance(node, ruamel.yaml.SequenceNode):
            value = constructor.construct_sequence(node, deep=True)
        else:
            value = constructor.construct_scalar(node)
        return {"!" + tag: value}

    def number(constructor, node):
        value = constructor.construct_yaml_float(node)
        # state.json keeps settings, and JSON has no infinity.
        return value if math.isfinite(value) else node.value

    Constructor.add_multi_constructor("!", construct)
    Constructor.add_constructor("tag:yaml.org,2002:float", number)
    # JSON has no dates either, and 2026-11-27 may be the name of a folder.
    Constructor.add_constructor(
        "tag:yaml.org,2002:timestamp", lambda _, node: node.value
    )
    # ruamel, as in HyperPyYAML: PyYAML would read 1e-3 as text.
    parser = ruamel.yaml.YAML(typ="safe", pure=True)
    parser.Constructor = Constructor
    return parsed(parser, text, "the settings") or {}


def parsed(parser: ruamel.yaml.YAML, text: str, name: object) -> Any:
    """Parses a yaml text; raises ValueError, with `name`, if it is invalid."""
    try:
        return parser.load(text)
    except ruamel.yaml.error.YAMLError as error:
        raise ValueError(f"{name}: it is not valid yaml: {error}") from error


class _Dumper(yaml.SafeDumper):
    """A dumper of {tag: value} as `plain_settings` reads tags."""

    def ignore_aliases(self, data):
        return True

    def represent_settings(self, settings):
        """Represents a dict, or the value under its only key if a tag."""
        tag = str(next(iter(settings), ""))
        if len(settings) > 1 or not tag.startswith("!"):
            return self.represent_dict(settings)
        value = settings[tag]
        plain = isinstance(value, dict | list)
        node = self.represent_data(value if plain else str(value))
        node.tag = tag
        return node

    def represent_short_list(self, values):
        """Represents a list in one line."""
        tag = "tag:yaml.org,2002:seq"
        return self.represent_sequence(tag, values, flow_style=True)


_Dumper.add_representer(dict, _Dumper.represent_settings)
_Dumper.add_representer(list, _Dumper.represent_short_list)
_Dumper.add_multi_representer(
    pathlib.PurePath, lambda dumper, path: dumper.represent_str(str(path))
)
# PyYAML quotes text that yaml 1.1 would not read as text. Without yaml 1.2's
# rules, ruamel would read the text "1e3" back as a number.
for versions, *resolver in ruamel.yaml.resolver.implicit_resolvers:
    if (1, 2) in versions:
        _Dumper.add_implicit_resolver(*resolver)


def dump_settings(settings: dict) -> str:
    """Returns the text of settings, as `plain_settings` reads it."""
    return "\n".join(
        yaml.dump({key: value}, Dumper=_Dumper, sort_keys=False, indent=4)
        for key, value in settings.items()
    )
