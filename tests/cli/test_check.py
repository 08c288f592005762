"""lgl check: counts, the machine, timed steps, an estimate."""

import shutil
import sys

import pytest
import soundfile

from lgl_plugin.cli import check
from lgl_plugin.cli.main import main

TINY = [
    "--device=cpu",
    "--batch_size=4",
    "--crop_seconds=0.4",
    "--dataloader_options={num_workers: 0}",
    "--new_encoder={network: {channels: [16, 16, 16, 16, 48]}}",
    "--n_clusters=3",
]
BY_TORCH = (
    "--cluster=!new:lgl_plugin.clustering.kmeans.TorchKMeans "
    "{n_clusters: !ref <n_clusters>}"
)


@pytest.fixture
def folder(audio, tmp_path):
    """The tiny audio with what people's folders hold besides."""
    folder = tmp_path / "mine"
    shutil.copytree(audio, folder)
    (folder / "ann" / "broken.wav").write_bytes(b"no audio")
    (folder / "ann" / "call.m4a").write_bytes(b"to be converted")
    (folder / "ann" / "notes.txt").write_text("of no use")
    shutil.copy(folder / "ann" / "0.wav", folder / "ann" / "._0.wav")
    wav, rate = soundfile.read(folder / "bob" / "0.wav")
    soundfile.write(folder / "bob" / "0.flac", wav, rate)
    return folder


def test_what_is_there_and_what_it_costs(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)  # torch clusters
    before = sorted(folder.rglob("*"))
    main(["check", str(folder), *TINY, BY_TORCH])
    printed = capsys.readouterr().out
    assert "17 files" in printed and "16 .wav, 1 .flac" in printed
    assert "1 cannot be used" in printed and "ann/broken.wav" in printed
    assert "Hidden     1 files" in printed
    assert "Convert    1 .m4a" in printed and "Others     1 .txt" in printed
    assert (
        "GOMP_SPINCOUNT=" in printed
        or "OMP_WAIT_POLICY=" in printed
        and "/dev/shm" in printed
    )
    assert "the preset small" in printed
    assert "s in Stage I\n" in printed and "s in Stage II\n" in printed
    for word in ("Embedding", "Time", "Disk", "Memory"):
        assert f"\n{word} " in printed
    assert sorted(folder.rglob("*")) == before  # nothing is written there


def test_what_will_not_do_is_status_2(folder, capsys):
    options = [option for option in TINY if "batch_size" not in option]
    with pytest.raises(SystemExit, match="2"):
        main(["check", str(folder), *options, "--batch_size=64"])
    assert "Lower batch_size" in capsys.readouterr().err


def test_faiss_is_asked_for_where_the_preset_clusters_by_it(
    folder, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(check, "cost_of_stage1", lambda session, made: {})
    with pytest.raises(SystemExit, match="2"):
        main(["check", str(folder), *TINY])
    assert capsys.readouterr().err.count("clustering needs faiss") == 1
