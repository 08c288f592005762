"""Reads a recipe's command line, and translates it to the other stage."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import pathlib
import shlex
import sys
from collections.abc import Callable, Container, Iterable
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
    SpeechBrain reads only its own options, and their names in full.

    Arguments
    ---------
    words : list[str]
        The path of a yaml, and options.
    own : dict, optional
        Further settings, as `plain_settings` returns them.

    Returns
    -------
    str
        The path of the yaml.
    speechbrain.utils.run_opts.RunOptions
        SpeechBrain's own options.
    str
        The other options and `own`, as a yaml text.

    Raises
    ------
    ValueError
        If an option of SpeechBrain has an invalid value, an option is given
        twice, or processes of torchrun cannot communicate by their backend.

    Example
    -------
    >>> words = ["stage2.yaml", "--output_folder=results/lr=0.1 #2"]
    >>> path, run_opts, overrides = parse_arguments(words)
    >>> path, overrides
    ('stage2.yaml', "output_folder: 'results/lr=0.1 #2'")
    """
    import speechbrain as sb

    from lgl_plugin.utils.device import check_backend

    theirs = run_options()
    taken: list[str] = []
    lines = []
    for word in paired_once(words, theirs):
        if word.startswith("--") and key_of(word) not in theirs:
            name, _, value = word[2:].partition("=")
            lines.append(as_typed(name, value))
        else:
            taken.append(word)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            path, run_opts, overrides = sb.parse_arguments(taken)
    except SystemExit as left:
        if not left.code:  # --help
            raise
        # The error alone: SpeechBrain's usage lists options refused here.
        *_, last = said.getvalue().splitlines()
        raise ValueError(last.partition("error: ")[2] or last) from None
    sys.stderr.write(said.getvalue())
    check_backend(run_opts.get("device"), run_opts["distributed_backend"])
    lines.insert(0, overrides)
    if own:
        lines.append(dump_settings(own).strip())
    return path, run_opts, "\n".join(filter(None, lines))


def run_options() -> set[str]:
    """Returns the names of SpeechBrain's own options."""
    from speechbrain.utils.run_opts import RunOptions

    return {"help", *(field.name for field in dataclasses.fields(RunOptions))}


def paired(words: Iterable[str], apart: Container[str] = ()) -> list[str]:
    """Joins `--key value` to `--key=value`.

    A key in `apart` may have no value: the word after it stays as it is.
    """
    pairs: list[str] = []
    needs_value = False  # whether the last word is an option without its value
    for word in words:
        is_option = word.startswith("--")
        if needs_value and not is_option:
            pairs[-1] += f"={word}"
        else:
            pairs.append(word)
        lacks_value = is_option and "=" not in word
        needs_value = lacks_value and key_of(word) not in apart
    return pairs


def paired_once(words: Iterable[str], apart: Container[str] = ()) -> list[str]:
    """Pairs words as `paired`; raises ValueError for an option given twice.

    For options given twice yaml raises an obscure error, and SpeechBrain
    silently takes the last value.
    """
    words = [*words]
    valued = [
        pair for pair in paired(words) if "=" in pair and pair[:2] == "--"
    ]
    names = [key_of(pair) for pair in valued]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--{name} is given twice")
    return paired(words, apart)


def key_of(option: str) -> str:
    """Returns the key of `--key=value`."""
    return option.removeprefix("--").partition("=")[0]


def not_typed(own: dict[str, Any], options: Iterable[str]) -> dict[str, Any]:
    """Returns the settings in `own` that no option names."""
    named = {key_of(option) for option in options}
    return {key: value for key, value in own.items() if key not in named}


def as_typed(name: str, value: str) -> str:
    """Returns a yaml line that gives an option the value that was typed."""
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
    keys, words = keys_of_stages(), []
    for word in paired(shlex.split(command), run_options()):
        if not word.startswith("--"):
            words.append(rename(word) if word.endswith(".yaml") else word)
        elif goes_to(key_of(word), stage, keys):
            words.append(word)
    return words


def keys_of_stages(yamls: Iterable[str | pathlib.Path] = ()) -> list[set[str]]:
    """Returns the keys that each stage takes: its settings, and its yaml's."""
    from lgl_plugin.runs.schema import Stage1Settings, Stage2Settings
    from lgl_plugin.runs.settings import read_preset

    keys = [{*each.model_fields} for each in (Stage1Settings, Stage2Settings)]
    for own, yaml in zip(keys, yamls):
        own.update(read_preset(yaml))
    return keys


def goes_to(key: str, stage: int, keys: list[set[str]]) -> bool:
    """Tells whether a key is for a stage; `keys` are those of each stage.

    A key of neither goes to both: it is an option of SpeechBrain or an error.
    """
    return key in keys[stage - 1] or key not in keys[2 - stage]


def _is_misread(text):
    """Tells whether SpeechBrain would misread a text, or fail on it."""
    marks = "=", " #", ": "
    return text.endswith(":") or any(mark in text for mark in marks)
