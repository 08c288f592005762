"""Reads a run's settings, and checks them as a whole.

A preset may be based on others, `__base__: [stage1.yaml, small.yaml]`. Its
entries replace theirs. A mapping without a tag changes single arguments, as
overrides on the command line do.
"""

import difflib
import functools
import inspect
import io
import os
import pathlib
import re
import warnings
from collections.abc import Iterable
from typing import Any

import pydantic
import torch
from hyperpyyaml import load_hyperpyyaml, resolve_references
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from speechbrain.utils.run_opts import RunOptions

from lgl_plugin.runs.arguments import parse_arguments, run_options
from lgl_plugin.runs.plain import dump_settings, parsed, plain_settings
from lgl_plugin.runs.pretrained import (
    embedding_size,
    encoder_files,
    encoder_settings,
    names_campplus,
)
from lgl_plugin.runs.schema import (
    ONLY_WITH,
    REFERRED_TO,
    LoaderOptions,
    Settings,
    Stage1Settings,
    Stage2Settings,
)
from lgl_plugin.runs.tried import explained, try_out
from lgl_plugin.runs.weights import ENCODER, load_pretrained
from lgl_plugin.utils.progress import silence_bars

# SpeechBrain's run options that are settings, too: SpeechBrain's parser does
# not put them among the overrides of the yaml.
SETTINGS_TOO = sorted(
    run_options() & {*Stage1Settings.model_fields, *Stage2Settings.model_fields}
)
# Settings that are paths of data.
DATA_PATHS = {
    "data_folder",
    "train_folder",
    "trial_folder",
    "verification_file",
    "manifest",
    "labels_file",
    "musan_folder",
    "rir_folder",
}
# Refused run options: they would change the result without a trace in the
# settings, or write an untrained encoder as if it were trained.
NOT_TAKEN = {
    "test_only": "nothing would be trained; `lgl verify` scores an encoder",
    "auto_mix_prec": "set precision to fp16",
    "bfloat16_mix_prec": "set precision to bf16",
    "data_parallel_backend": "start a process for each GPU by torchrun",
}


def load_settings(
    path: str | pathlib.Path,
    overrides: str = "",
    run_opts: RunOptions | None = None,
    trial: bool = True,
) -> tuple[Settings, str]:
    """Reads a yaml with its bases and overrides, and checks all of it.

    Nothing is written, and no object of the yaml is made before every value
    has been checked. Then the modules to train are made once, and tried on
    noise.

    Arguments
    ---------
    path : str or pathlib.Path
        A yaml of the recipe.
    overrides : str
        A yaml text, as `speechbrain.parse_arguments` returns it.
    run_opts : speechbrain.utils.run_opts.RunOptions, optional
        SpeechBrain's run options. Those that were given on the command line and
        change the result become settings.
    trial : bool
        Whether to try the modules. False if another encoder than the yaml's
        will be trained.

    Returns
    -------
    Settings
        Its attributes are the values and the objects that the yaml makes.
    str
        The yaml's text after overrides, references resolved.

    Raises
    ------
    ValueError
        For an unknown name, a wrong type, a value out of its range, an
        unknown choice, or settings that contradict each other; also for
        classes that cannot be made or do not fit each other. The message names
        the setting, and for a mistyped name the nearest one.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "mine.yaml").write_text("stage: 1\\nlr: 0.001\\n")
    >>> load_settings(folder / "mine.yaml", "Lr: 0.1")
    Traceback (most recent call last):
    ValueError: ...mine.yaml: there is no setting 'Lr'; did you mean 'lr'?
    """
    if run_opts is not None:
        silence_bars(run_opts)  # a yaml's augmenter may read hours of noise
    text = _checked_text(path, overrides, run_opts)
    plain = plain_settings(text)
    schema = _schema(plain)
    settings = {key: plain[key] for key in plain if key in schema.model_fields}
    try:
        checked = dict(schema.model_validate(settings))
    except pydantic.ValidationError as error:
        problems = [_problem(one) for one in error.errors()]
        raise ValueError(f"{path}: " + "\n".join(problems)) from None
    try:
        hparams = load_hyperpyyaml(text)
    except (OSError, MemoryError):  # their messages say what to do
        raise
    except Exception as error:  # the yaml's classes may raise any error
        raise ValueError(f"{path}: {explained(error)}") from error
    rate = checked["sample_rate"]
    for name in settings:
        _check_arguments(f"{path}: {name}", hparams[name], rate)
    if trial:
        try:
            try_out(plain, {**dict.fromkeys(checked), **hparams})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    if source := checked.get("pretrained_encoder"):
        weights = encoder_files(source).get(ENCODER)
        first = hparams.get("new_first_encoder") or hparams["new_encoder"]
        if weights is not None:
            with torch.random.fork_rng():
                load_pretrained(first().network, weights)
    values = {key: hparams[key] for key in settings}
    # Plain values as checked: a folder's name 20261127 is now a text.
    values.update(
        (key, value)
        for key, value in checked.items()
        if value is None or isinstance(value, bool | int | float | str)
    )
    options = hparams["dataloader_options"]
    loader: Any = functools.partial(torch.utils.data.DataLoader, **options)
    _check_arguments(f"{path}: dataloader_options", loader)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # training gives them, once
            loader([0, 0])
    except ValueError as error:  # such as prefetch_factor without workers
        raise ValueError(f"{path}: dataloader_options: {error}") from error
    values["dataloader_options"] = LoaderOptions.model_construct(**options)
    return schema.model_construct(**values), text


def settings_of(
    words: list[str], own: dict[str, Any] | None = None, trial: bool = True
) -> tuple[Settings, str]:
    """Returns the checked settings of a command line, and the yaml's text.

    The arguments are those of `parse_arguments`; see `load_settings`.
    """
    path, run_opts, overrides = parse_arguments(words, own)
    return load_settings(path, overrides, run_opts, trial)


def plain_settings_of(
    words: list[str], own: dict[str, Any] | None = None
) -> dict:
    """Returns a command line's settings as plain data; checks only names."""
    path, run_opts, overrides = parse_arguments(words, own)
    return plain_settings(_checked_text(path, overrides, run_opts))


def _checked_text(
    path: str | pathlib.Path,
    overrides: str = "",
    run_opts: RunOptions | None = None,
) -> str:
    """Returns a yaml's text with bases, overrides and references resolved.

    Of the checks of `load_settings`, only those of names are made.
    """
    for name, instead in NOT_TAKEN.items():
        if _given(run_opts, [name]).get(name):
            raise ValueError(f"--{name} is not taken here: {instead}")
    referred = set()
    tree = read_preset(path, referred)
    changes = parsed(YAML(), overrides, "the options") or {}
    changes.update(_given(run_opts, SETTINGS_TOO))
    _merge(tree, changes)
    _check_names(path, tree, referred | _referred(tree))
    _complete_paths(tree)
    _take_pretrained(path, tree, changes)
    _check_effect(path, tree, changes)
    return _as_text(tree)


def _take_pretrained(path, tree, changes):
    """Takes new_encoder from a pretrained encoder that describes itself."""
    if not tree.get("pretrained_encoder"):
        return
    plain = plain_settings(_as_text(tree))
    source = plain["pretrained_encoder"]
    described = encoder_settings(str(source), bare=True)
    if described is None:
        return
    if pathlib.Path(str(source)).is_file() and names_campplus(
        plain["new_encoder"]
    ):
        return  # the weights do not tell the features; the yaml does
    try:
        size = embedding_size(described)
    except Exception as error:  # its classes may raise any error
        raise ValueError(
            f"{path}: pretrained_encoder: {source} describes an encoder that "
            f"embeds nothing: {explained(error)}"
        ) from error
    if tree.get("new_first_encoder") is None:
        described["embedding_size"] = size
    else:  # the pretrained encoder only gives the first labels
        rate = plain["sample_rate"]
        if described["sample_rate"] != rate:
            raise ValueError(
                f"{path}: pretrained_encoder: {source} is for audio of "
                f"{described['sample_rate']} Hz, new_encoder for {rate} Hz"
            )
        described = {"new_first_encoder": described["new_encoder"]}
    for name, value in described.items():
        if name in changes and changes[name] != value:
            said = f" ({value})" if isinstance(value, int) else ""
            raise ValueError(
                f"{path}: {name}: {source}, the pretrained_encoder, says that "
                f"itself{said}: leave {name} out"
            )
    _merge(tree, YAML().load(dump_settings(described)))


def without_helpers(text: str) -> str:
    """Drops the entries of a resolved yaml that only served as references.

    Their values have replaced the references. With entries that nothing refers
    to, a run's yaml would be refused as a preset.
    """
    tree = YAML().load(text)
    fields = _schema(tree).model_fields
    for name in [*tree]:
        if name not in fields and name != "__set_seed":
            del tree[name]
    return _as_text(tree)


def read_plain(path: str | pathlib.Path) -> dict:
    """Reads a yaml with its bases as plain data; needs no data_folder."""
    tree = read_preset(path)
    tree["data_folder"] = ""
    return plain_settings(_as_text(tree))


def _as_text(tree):
    """Writes a yaml with its references resolved."""
    text = io.StringIO()
    YAML().dump(tree, text)
    return resolve_references(text.getvalue()).getvalue()


def read_preset(
    path: str | pathlib.Path,
    referred: set[str] | None = None,
    above: tuple[pathlib.Path, ...] = (),
) -> dict:
    """Reads a yaml over those that its `__base__` names, tags unresolved.

    Names that an entry of any of these yamls refers to are added to the set
    `referred`. `above` are the yamls that have this yaml as a base, the nearest
    last. Raises ValueError if a base is missing, or a yaml is its own base.
    """
    path = pathlib.Path(path)
    if above and not path.exists():
        raise ValueError(f"{above[-1]}: __base__: there is no {path}")
    if path.resolve() in [yaml.resolve() for yaml in above]:
        raise ValueError(f"{above[-1]}: __base__: {path} is based on this yaml")
    tree = parsed(YAML(), path.read_text(encoding="utf-8"), path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds no settings, lines of `name: value`")
    if referred is not None:
        referred |= _referred(tree)
    bases = tree.pop("__base__", [])
    whole = CommentedMap()
    for base in [bases] if isinstance(bases, str) else bases:
        below = read_preset(path.parent / base, referred, (*above, path))
        _merge(whole, below)
    _merge(whole, tree)
    return whole


def _schema(tree):
    """Returns the class of settings of the stage that a yaml is for."""
    return Stage2Settings if tree.get("stage") == 2 else Stage1Settings


def _given(run_opts, names):
    """Picks run options that were given on the command line."""
    typed = getattr(run_opts, "overridden_args", ())
    return {name: run_opts[name] for name in names if name in typed}


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Returns a hint at the name that is nearest to a mistyped one, or ""."""
    if name in LoaderOptions.model_fields:
        return f"; write --dataloader_options='{{{name}: …}}'"
    near = difflib.get_close_matches(str(name), [*known], 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _check_names(path, tree, referred):
    """Refuses names that no code reads and no other entry refers to.

    A reference in a base counts, too: a yaml may have replaced the entry of its
    base that refers to the name.
    """
    fields = _schema(tree).model_fields
    for name in tree:
        if name in fields or name in referred or str(name).startswith("__"):
            continue
        hint = did_you_mean(name, {**fields, **tree}.keys() - {name})
        if name in Stage1Settings.model_fields:
            hint = " of Stage II, only of Stage I"
        elif name in Stage2Settings.model_fields:
            hint = " of Stage I, only of Stage II"
        raise ValueError(f"{path}: there is no setting {name!r}{hint}")


def _check_effect(path, tree, changes):
    """Refuses overrides without effect in this yaml."""
    for name in changes:
        needed = ONLY_WITH.get(name)
        if needed and not tree.get(needed):
            raise ValueError(
                f"{path}: {name} changes nothing where {needed} is 0: leave "
                f"{name} out, or set {needed} to 1 or more"
            )
        read = name == "embedding_size" and tree.get("stage") == 1
        # This also refuses entries that are no settings, such as
        # compute_features: an encoder that describes itself has its own.
        fields = _schema(tree).model_fields.keys() - {*REFERRED_TO}
        if name not in fields | _in_use(tree) and not read:
            raise ValueError(
                f"{path}: {name} changes nothing here, as no setting refers "
                "to it"
            )


def _referred(tree):
    """Lists the entries that others refer to."""
    text = io.StringIO()
    YAML().dump(tree, text)
    return set(re.findall(r"<(\w+)", text.getvalue()))


def _in_use(tree):
    """Lists the entries that settings refer to, directly or indirectly."""
    fields = _schema(tree).model_fields
    left = [name for name in tree if name in fields]
    used = set()
    while left:
        name = left.pop()
        new = _referred({name: tree[name]}) - used if name in tree else set()
        used |= new
        left += new
    return used


def _merge(tree, changes):
    """Merges entries into a tree; an untagged mapping changes single keys."""
    for key, value in changes.items():
        inner = isinstance(value, dict) and not getattr(
            getattr(value, "tag", None), "value", None
        )
        before = tree.get(key)
        if inner and isinstance(before, dict):
            _merge(before, value)
            continue
        if inner and getattr(before, "value", None) == "":
            # A class without arguments, `!new:<class>`, gets arguments.
            value.yaml_set_ctag(before.tag)
        tree[key] = value


def _complete_paths(tree):
    """Replaces a leading ~, which some shells keep, by the home folder.

    Paths of data become absolute, unless they are references. A finished run
    is read from any folder, where a relative path could lead to other audio of
    the same name.
    """
    for key, value in tree.items():
        if isinstance(value, str) and value.startswith("~/"):
            value = tree[key] = os.path.expanduser(value)
        typed = isinstance(value, str | int) and not isinstance(value, bool)
        if key in DATA_PATHS and typed and value != "":
            tree[key] = os.path.abspath(str(value))


def _check_arguments(name, factory, sample_rate=None):
    """Refuses arguments that the class of a `!name:` entry does not take.

    Without this check the error would come only when the object is made: for
    the last round's encoder days later.
    """
    if not isinstance(factory, functools.partial):
        return
    for key, value in factory.keywords.items():
        _check_arguments(f"{name}.{key}", value, sample_rate)
    try:
        signature = inspect.signature(factory.func)
    except ValueError:  # some classes written in C have none
        return
    try:
        signature.bind_partial(*factory.args, **factory.keywords)
    except TypeError as error:
        made = factory.func.__qualname__
        raise ValueError(f"{name}: {made}: {error}") from None
    if hasattr(factory.func, "check_arguments"):
        try:
            factory.func.check_arguments(*factory.args, **factory.keywords)
            factory.func.check_sample_rate(sample_rate, **factory.keywords)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def _problem(error):
    """Returns a validation error's message in terms of the yaml."""
    name = ".".join(str(part) for part in error["loc"])
    said = error["msg"].removeprefix("Value error, ")
    said = said.removeprefix("Input ").removeprefix("String ")
    if not name:  # of several settings together
        return said
    if error["type"] == "missing":
        return f"{name} is missing"
    value = error["input"]
    if error["type"] == "literal_error":
        choices = re.findall(r"'(\w+)'", error["ctx"]["expected"])
        said += did_you_mean(value, choices)
    tag = next(iter(value), None) if isinstance(value, dict) else None
    if str(tag).startswith("!"):  # of an entry that makes something
        return f"{name}: {tag} {said}"
    return f"{name}: {value!r} {said}"
