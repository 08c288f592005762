"""The ceiling's script as torchrun starts it; test_paper.py trains it."""

import signal

import ceiling  # of the recipe's folder
import pytest
import speechbrain as sb
from tiny import RECIPE

from lgl_plugin.utils.signals import stop


def test_ranks_are_joined_and_errors_are_explained(monkeypatch, capsys):
    """Before anything that they share: each would train a run of its own."""
    seen = []

    def load(*given):
        seen.append(signal.getsignal(signal.SIGTERM) == stop.handle)
        raise ValueError("what is wrong")

    joined = sb.utils.distributed
    monkeypatch.setattr(joined, "ddp_init_group", lambda _: seen.append("join"))
    monkeypatch.setattr(ceiling, "load_settings", load)
    yaml = str(RECIPE / "hparams" / "small_stage2.yaml")
    monkeypatch.setattr("sys.argv", ["ceiling.py", yaml, "--data_folder=x"])
    with pytest.raises(SystemExit) as end:
        ceiling.main()
    assert end.value.code == 2 and seen == ["join", True]
    assert capsys.readouterr().err == "ValueError: what is wrong\n"
