"""lgl export and others of a run: what an adaptation's folder is told."""

import pytest

from lgl_plugin.cli.main import main
from lgl_plugin.inference import onnx_export


@pytest.mark.parametrize(
    "call",
    [
        "export {}",
        "export {} --onnx",
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
    assert "no adapted encoder" not in said
    (adapted / "export" / "adapted").rmdir()
    with pytest.raises(SystemExit, match="2"):
        main(call.format(adapted).split())
    said = capsys.readouterr().err
    assert (
        f"none was kept, or the work is not done, as `lgl status {adapted}`"
        in said
    )


def test_onnx_for_the_folder_of_an_encoder(encoder, capsys, monkeypatch):
    """Such as one of `lgl adapt`, for which no run could be named."""
    given = []
    monkeypatch.setattr(
        onnx_export, "export_onnx", lambda *paths: given.extend(paths)
    )
    main(["export", str(encoder), "--onnx"])
    assert given == [str(encoder), encoder / "encoder.onnx"]
    assert f"Written: {encoder}/encoder.onnx" in capsys.readouterr().out
    for other in ("iter1", "--threshold=0", "--license=mit", "--device=cpu"):
        with pytest.raises(SystemExit, match="2"):
            main(["export", str(encoder), other, "--onnx"])
        assert "without another option, adds" in capsys.readouterr().err
    assert len(given) == 2
