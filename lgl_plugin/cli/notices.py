"""Messages of the package, for verbs that begin no log of their own."""

import logging


def show_notices() -> None:
    """Shows the package's notices on stderr, and of others warnings alone."""
    logging.getLogger("lgl_plugin").setLevel(logging.INFO)
    # SpeechBrain names what it switches off in torch, each time.
    logging.getLogger("speechbrain.utils.quirks").setLevel(logging.WARNING)
    if logging.lastResort is not None:  # shows what no handler takes
        logging.lastResort.setLevel(logging.INFO)
