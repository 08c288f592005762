"""Progress bars that SpeechBrain's option --noprogressbar silences, too."""

from typing import Any

import tqdm as plain


class tqdm(plain.tqdm):
    """A progress bar of tqdm that is hidden while `silent` is set.

    tqdm reads its own switch, TQDM_DISABLE, only when it is imported.
    """

    silent = False

    def __init__(self, *args: Any, disable: bool = False, **kwargs: Any):
        super().__init__(*args, disable=disable or self.silent, **kwargs)


def silence_bars(run_opts: Any) -> None:
    """Shows or hides all progress bars of this process, by the run options."""
    tqdm.silent = bool(run_opts.get("noprogressbar"))
