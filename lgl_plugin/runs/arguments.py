"""A recipe's command line: its values as typed, and for the other stage."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from lgl_plugin.runs.plain import dump_settings

if TYPE_CHECKING:
    from speechbrain.utils.run_opts import RunOptions

# Settings whose values are text though yaml may read "[a-z]" as a list.
TEXTS = ("trained_weights",)


def parse_arguments(
    words: list[str], own: dict[str, Any] | None = None
) -> tuple[str, RunOptions, str]:
    """Reads a command line as `speechbrain.parse_arguments` does.

    SpeechBrain splits words at each "=" and quotes nothing: it reads a folder
    "lr=0.1" as "lr 0.1", "Tape #3" as "Tape", and fails on "Tape: 3". Here
    only its own options are read so, and none by a shortened name.

    Arguments
    ---------
    words : list[str]
        The path of a yaml, and options.
    own : dict, optional
        Settings beside the options, as `plain_settings` returns them.

    Returns
    -------
    str
        The path of the yaml.
    speechbrain.utils.run_opts.RunOptions
        SpeechBrain's own options.
    str
        The other ones and `own`, as a yaml text.

    Example
    -------
    >>> words = ["stage2.yaml", "--output_folder=results/lr=0.1 #2"]
    >>> path, run_opts, overrides = parse_arguments(words)
    >>> path, overrides
    ('stage2.yaml', "output_folder: 'results/lr=0.1 #2'")
    """
    import speechbrain as sb
    from speechbrain.utils.run_opts import RunOptions

    theirs = {"help", *(field.name for field in dataclasses.fields(RunOptions))}
    taken: list[str] = []
    ours: list[str] = []
    waits = False  # whether the last word is an option of ours without a value
    for word in words:
        is_option = word.startswith("--")
        is_ours = is_option and key_of(word) not in theirs
        if is_ours:
            ours.append(word)
        elif waits and not is_option:  # `--key value`
            ours[-1] += f"={word}"
        else:
            taken.append(word)
        waits = is_ours and "=" not in word
    path, run_opts, overrides = sb.parse_arguments(taken)
    pairs = (word[2:].partition("=") for word in ours)
    lines = [overrides, *(as_typed(name, value) for name, _, value in pairs)]
    if own:
        lines.append(dump_settings(own).strip())
    return path, run_opts, "\n".join(filter(None, lines))


def key_of(option: str) -> str:
    """Returns the key of `--key=value`."""
    return option.removeprefix("--").partition("=")[0]


def not_typed(own: dict[str, Any], options: Iterable[str]) -> dict[str, Any]:
    """Returns those of some settings that no option names."""
    named = {key_of(option) for option in options}
    return {key: value for key, value in own.items() if key not in named}


def as_typed(name: str, value: str) -> str:
    """Returns the yaml line of an option, which reads as it was typed."""
    if name in TEXTS and value != "null":
        return dump_settings({name: value}).strip()
    if _is_misread(value) and value[0] not in "!{['\"":  # not a yaml text
        return dump_settings({name: value}).strip()
    return f"{name}: {value}"


def for_other_stage(
    command: str, stage: int, rename: Callable[[str], str]
) -> list[str]:
    """Returns the words of a recipe's command for another stage.

    `rename` gives that stage's yaml for the command's. Options that are
    settings of the command's own stage alone are left out.
    """
    from lgl_plugin.runs.schema import Stage1Settings, Stage2Settings

    other, own = Stage2Settings.model_fields, Stage1Settings.model_fields
    if stage == 1:
        other, own = own, other
    words, name = [], ""
    for word in shlex.split(command):
        if word.startswith("--"):
            name = key_of(word)
        elif word.endswith(".yaml") and name != "stage1_yaml":
            word, name = rename(word), ""
        # Also where a value stands behind its option and a space.
        if name in other or name not in own:
            words.append(word)
    return words


def _is_misread(text):
    """Says whether SpeechBrain would read another text than this, or none."""
    marks = "=", " #", ": "
    return text.endswith(":") or any(mark in text for mark in marks)
