"""Speaker encoders from unlabelled speech, for SpeechBrain."""

import sys

__version__ = "0.1.0"

# `python -m lgl_plugin.nnet.gates` would end in silence with status 0. While
# Python looks for a module that -m names, "-m" stands for its path.
if sys.argv[:1] == ["-m"]:
    for word in sys.orig_argv:
        name = word.removeprefix("-m")
        if name.startswith("lgl_plugin.") and name != "lgl_plugin.__main__":
            sys.exit(f"{name} is no command; `lgl --help` lists them")
