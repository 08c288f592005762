"""lgl compare: a cosine, a threshold and a verdict."""

import numpy as np
import pytest
import soundfile

from lgl_plugin.cli.main import main


@pytest.mark.parametrize(
    "other, verdict",
    [("ann/1.wav", "one speaker"), ("bob/0.wav", "two speakers")],
)
def test_verdict(encoder, audio, capsys, other, verdict):
    main(["compare", str(encoder), f"{audio}/ann/0.wav", f"{audio}/{other}"])
    lines = [
        line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()
    ]
    found = dict(lines)
    assert found["threshold"] == "0.900" and found["verdict"] == verdict
    assert (float(found["cosine"]) >= 0.9) == (verdict == "one speaker")


def test_a_channel_of_a_call(encoder, audio, tmp_path, capsys):
    path = audio / "ann" / "0.wav"
    one, _ = soundfile.read(path, always_2d=True)
    call = tmp_path / "call.wav"
    soundfile.write(call, np.hstack([np.sign(one), one]), 16000)
    cosines = []
    for channel in (0, 1):
        words = [str(path), str(call), f"--channel={channel}"]
        main(["compare", str(encoder), *words])
        cosines.append(float(capsys.readouterr().out.split()[1]))
    assert cosines[0] < cosines[1] == 1.0
    with pytest.raises(SystemExit, match="2"):
        main(["compare", str(encoder), str(path), str(call), "--channel=2"])
    assert "no channel 2" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["compare", str(encoder), str(path), str(call), "--channel=-1"])
    assert "-1: channels count from 0" in capsys.readouterr().err


def test_an_encoder_without_a_threshold(encoder, audio, capsys, tmp_path):
    for name in ("hyperparams.yaml", "embedding_model.ckpt"):
        (tmp_path / name).write_bytes((encoder / name).read_bytes())
    yaml = tmp_path / "hyperparams.yaml"
    yaml.write_text(yaml.read_text().replace("threshold: 0.9\n", ""))
    files = [f"{audio}/ann/0.wav", f"{audio}/ann/1.wav"]
    main(["compare", str(tmp_path), *files])
    printed = capsys.readouterr().out
    assert "--threshold" in printed and "verdict" not in printed
    main(["compare", str(tmp_path), *files, "--threshold=0.5"])
    assert "verdict    one speaker" in capsys.readouterr().out


def test_a_missing_file_is_named(encoder, audio, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["compare", str(encoder), f"{audio}/ann/0.wav", "nowhere.wav"])
    assert "nowhere.wav cannot be opened" in capsys.readouterr().err


def test_a_recording_that_is_too_short_has_no_verdict(
    encoder, audio, tmp_path, capsys
):
    short = tmp_path / "short.wav"
    soundfile.write(short, np.full(1600, 0.1), 16000)
    with pytest.raises(SystemExit, match="2"):
        main(["compare", str(encoder), f"{audio}/ann/0.wav", str(short)])
    assert "short.wav lasts 0.100 s, under 0.3 s" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["compare", "who", "export"])
@pytest.mark.parametrize("threshold", ["25", "nan", "-1.5"])
def test_a_threshold_that_is_no_cosine(verb, threshold, capsys):
    words = {"export": ["run"]}.get(verb, ["encoder", "first", "second"])
    with pytest.raises(SystemExit, match="2"):
        main([verb, *words, f"--threshold={threshold}"])
    assert f"{threshold} is no cosine, which lies" in capsys.readouterr().err
