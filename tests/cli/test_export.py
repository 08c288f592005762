"""lgl export and others of a run: what an adaptation's folder is told."""

import pytest

from lgl_plugin.cli.main import main


@pytest.mark.parametrize(
    "call",
    [
        "export {}",
        "export {} start",
        "export {} start --average=2",
        "landscape {}",
    ],
)
def test_an_adaptation_is_told_where_its_encoder_is(adapted, call, capsys):
    """It has steps and encoders, as a training has, but other settings."""
    with pytest.raises(SystemExit, match="2"):
        main(call.format(adapted).split())
    said = capsys.readouterr().err
    assert f"Its adapted encoder: {adapted}/export/adapted." in said
    assert f"Its training: {adapted}/training-1." in said
