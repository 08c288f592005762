"""The command `lgl`: speaker encoders from unlabelled speech."""

import argparse
import importlib
import os
import sys
from typing import Any

from lgl_plugin import __version__
from lgl_plugin.utils.errors import EXPLAINED, WRONG_CALL, logged_message
from lgl_plugin.utils.threads import spin_briefly

# Each verb is a module of this folder with `add_arguments` and `run`. torch and
# SpeechBrain are imported in `run` only, so that `--help` is instant.
VERBS = (
    *("check", "train", "adapt", "status", "report", "export"),
    *("embed", "compare", "who", "verify"),
    *("attribute", "landscape"),
    *("count", "pack", "corpus", "recipe"),
)


def main(arguments: list[str] | None = None) -> None:
    """Runs the verb that the command line names.

    An error that the user can mend becomes a message on stderr and SystemExit.
    The status is 2 if an argument, or the file that it names, cannot be used,
    and 1 if the work failed. Ctrl-C prints a line and gives status 130. With
    `--debug` errors are raised unchanged.
    """
    spin_briefly()  # before torch is loaded, when OpenMP reads the setting
    arguments = sys.argv[1:] if arguments is None else arguments
    options, rest = build_parser().parse_known_args(arguments)
    options = {name: at_home(value) for name, value in vars(options).items()}
    run, verb, debug = (options.pop(key) for key in ("run", "parser", "debug"))
    if empty := [name for name, value in options.items() if value == ""]:
        # Refused, because an empty path would be the current folder.
        verb.error(f"{empty[0]} is empty: is a variable of the shell unset?")
    if "settings" in options:
        # SpeechBrain's own --debug trains only a few batches.
        options["settings"] = [*rest, *(["--debug"] if debug else [])]
        if swapped := swapped_value(arguments, rest):
            verb.error(swapped)
    elif rest:
        verb.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        run(**options)
    except EXPLAINED as error:
        if debug:
            raise
        print(f"{verb.prog}: {logged_message(error)}", file=sys.stderr)
        status = 2 if isinstance(error, WRONG_CALL) else 1
        raise SystemExit(status) from error
    except KeyboardInterrupt:
        if debug:
            raise
        # Training steps handle Ctrl-C themselves, see `utils.signals`.
        print(f"{verb.prog}: stopped by Ctrl-C", file=sys.stderr)
        raise SystemExit(130) from None


def at_home(value: Any) -> Any:
    """Replaces a leading ~ by the home folder; shells do not in --x=~/y."""
    if isinstance(value, list):
        return [at_home(each) for each in value]
    if isinstance(value, str) and value.startswith("~/"):
        return os.path.expanduser(value)
    return value


def swapped_value(arguments: list[str], rest: list[str]) -> str | None:
    """Returns a hint where argparse took an option's value for AUDIO."""
    for key, value in zip(rest, rest[1:]):
        if not key.startswith("--") or "=" in key or value.startswith("--"):
            continue
        typed = arguments[arguments.index(key) + 1]
        if typed != value and rest.count(key) == 1:
            return f"write {key}={typed}, or {value} before {key}"
    return None


def build_parser() -> argparse.ArgumentParser:
    """Makes the parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="lgl", description=__doc__, allow_abbrev=False
    )
    version = f"lgl-plugin {__version__}"
    parser.add_argument("--version", action="version", version=version)
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for name in VERBS:
        module = importlib.import_module(f"lgl_plugin.cli.{name}")
        summary = (module.__doc__ or "").splitlines()[0].partition(": ")[2]
        verb = verbs.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:],
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            # `train` passes unknown options on, such as --n_cluster.
            allow_abbrev=False,
        )
        module.add_arguments(verb)
        debug = "show an error's traceback"
        if name == "train":  # SpeechBrain's own option of that name
            debug += ", and train a few batches of each phase to try the setup"
        verb.add_argument("--debug", action="store_true", help=debug)
        verb.set_defaults(run=module.run, parser=verb)
    return parser
