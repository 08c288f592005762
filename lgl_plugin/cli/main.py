"""The command `lgl`: speaker encoders from unlabelled speech."""

import argparse
import importlib

from lgl_plugin import __version__

# Each is a module of this folder with `add_arguments` and `run`. torch and
# SpeechBrain are imported in `run` only, so that help comes at once.
VERBS = ("verify", "export", "report", "elbow", "pack", "corpus", "recipe")


def main(arguments: list[str] | None = None) -> None:
    """Runs the verb that the command line names.

    Arguments
    ---------
    arguments : list of str, optional
        The command line without the program's name; `sys.argv` if not given.

    Raises
    ------
    SystemExit
        With status 2 and one line on stderr if an argument, or the file that
        it names, cannot be used.

    Example
    -------
    >>> main(["recipe", str(getfixture("tmp_path") / "mine")])
    16 files are in ...
    """
    parser = argparse.ArgumentParser(prog="lgl", description=__doc__)
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
        )
        module.add_arguments(verb)
        verb.set_defaults(run=module.run, parser=verb)
    options = vars(parser.parse_args(arguments))
    run, verb = options.pop("run"), options.pop("parser")
    try:
        run(**options)
    except (OSError, ValueError) as error:
        verb.error(str(error))
