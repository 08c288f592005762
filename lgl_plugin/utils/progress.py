"""Progress bars that SpeechBrain's option --noprogressbar silences, too."""

from typing import Any

import tqdm as plain


class tqdm(plain.tqdm):
    """A bar of tqdm's that is not shown where `silent` is set.

    tqdm's own switch, TQDM_DISABLE, is read once, when tqdm is imported.
    """

    silent = False

    def __init__(self, *args: Any, disable: bool = False, **kwargs: Any):
        super().__init__(*args, disable=disable or self.silent, **kwargs)


def silence_bars(run_opts: Any) -> None:
    """Shows or silences all bars of this process, as the run options say."""
    tqdm.silent = bool(run_opts.get("noprogressbar"))
