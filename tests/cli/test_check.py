"""lgl check: counts, the machine, timed steps, an estimate."""

import pathlib
import re
import shutil
import sys
import tempfile
import types
from unittest import mock

import pytest
import soundfile
import torch

from lgl_plugin.cli import cost
from lgl_plugin.cli.main import main
from lgl_plugin.runs.arguments import key_of

TINY = [
    "--device=cpu",
    "--batch_size=4",
    "--crop_seconds=0.4",
    "--dataloader_options={num_workers: 0}",
    "--new_encoder={network: {channels: [16, 16, 16, 16, 48]}}",
    "--n_clusters=3",
]
LENIENT = "--max_bad_share=0.1"  # one of 17 files of `folder` is bad
FEW = ["--ssps_epochs=0"]  # whose clusters eight utterances do not make
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
    with pytest.raises(SystemExit, match="1"):  # of too many bad files
        main(["check", str(folder), *TINY, BY_TORCH])
    printed = capsys.readouterr().out
    assert "17 files" in printed and "16 .wav, 1 .flac" in printed
    assert "1 cannot be used" in printed and "ann/broken.wav" in printed
    assert "Hidden     1 files" in printed
    assert "Convert    1 .m4a" in printed and "Others     1 .txt" in printed
    assert "GOMP_SPINCOUNT=" in printed or "OMP_WAIT_POLICY=" in printed
    assert "\n/dev/shm   " in printed and "\nVersions   " in printed
    assert "the preset small" in printed
    assert "s in Stage I\n" in printed and "s in Stage II\n" in printed
    for word in ("Embedding", "Time", "Disk", "Memory"):
        assert f"\n{word} " in printed
    assert "Not yet    1 files are bad, more than max_bad_share=0.02" in printed
    last = printed.splitlines()[-1]
    assert last.startswith(f"Train it with: lgl train {folder} --output_folder")
    assert last.endswith("--max_bad_share=0.09") and TINY[1] in last
    assert sorted(folder.rglob("*")) == before  # nothing is written there


def named_files(text):
    """The files of the check's own folder that a text names."""
    found = re.findall(rf"{tempfile.gettempdir()}/lgl-check-[\w/.-]*\w", text)
    return [pathlib.Path(name) for name in found]


def test_no_file_is_named_that_is_gone(
    folder, opened, tmp_path, capfd, caplog, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    main(["check", str(folder), *TINY, LENIENT])
    printed = "".join(capfd.readouterr()) + caplog.text
    assert not named_files(printed) and "bad_files.txt" not in printed
    assert "Setting seed" not in printed
    rows = [f"{n},0.5,$data_root/ann/{n}.wav,0,8000," for n in range(9)]
    head = "ID,duration,wav,start,stop,spk_id"
    (tmp_path / "own.csv").write_text("\n".join([head, *rows]))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.wav").write_bytes(b"no audio")
    own = str(folder), *FEW, f"--manifest={tmp_path}/own.csv"
    for words in own, (str(tmp_path / "bad"),):
        with pytest.raises(SystemExit, match="2"):
            main(["check", *words, *TINY])
        (path,) = named_files(capfd.readouterr().err)
        assert path.read_text().startswith(("4\t", "a.wav\t"))


@pytest.mark.parametrize("error", [RuntimeError("no"), ValueError("no")])
def test_the_log_that_has_a_traceback_stays(
    folder, error, capfd, monkeypatch, tmp_path
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(cost, "cost_of_stage1", mock.Mock(side_effect=error))
    with pytest.raises(SystemExit):
        main(["check", str(folder), *TINY, LENIENT])
    said = named_files(capfd.readouterr().err)
    assert [path.name for path in said] == ["log.txt"] * isinstance(
        error, RuntimeError
    )
    for path in said:
        assert "RuntimeError: no" in path.read_text()
    assert bool([*tmp_path.glob("lgl-check-*")]) == bool(said)


def test_what_will_not_do_is_status_2(folder, capsys):
    options = [option for option in TINY if "batch_size" not in option]
    with pytest.raises(SystemExit, match="2"):
        main(["check", str(folder), *options, "--batch_size=64"])
    assert "Lower batch_size" in capsys.readouterr().err


def test_faiss_is_asked_for_where_the_preset_clusters_by_it(
    folder, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(cost, "cost_of_stage1", lambda session, made: {})
    with pytest.raises(SystemExit, match="2"):
        main(["check", str(folder), *TINY])
    assert capsys.readouterr().err.count("clustering needs faiss") == 1


@pytest.fixture
def opened(monkeypatch):
    """The sessions that would be timed."""
    sessions = []

    def note(session, made):
        sessions.append(session)
        return {"both": float(made["kept"])}

    monkeypatch.setattr(cost, "cost_of_stage1", note)
    monkeypatch.setattr(cost, "cost_of_stage2", note)
    return sessions


@pytest.mark.parametrize(
    "option, message",
    [
        ("--n_clusters=18", "n_clusters=18 is more than the 17"),
        ("--labels_file=no.csv", "labels: there is no file"),
        ("--manifest=no.csv", "manifest: there is no file"),
        ("--min_cluster_size=18", "min_cluster_size: 18 is more than the 17"),
        ("--held_out_share=0.95", "one at least is held out"),
        ("--trained_weights=dense", "no weight of the encoder has 'dense'"),
        ("--pretrained_encoder={}/ann/0.wav", "read as a file of weights"),
        ("--labels_file={}/labels.csv", "nobody.wav"),
    ],
)
def test_what_training_would_refuse_is_refused(
    option, message, folder, opened, capsys
):
    (folder / "labels.csv").write_text("utterance,speaker\nnobody.wav,Ann\n")
    options = [o for o in TINY if key_of(o) != key_of(option)]
    with pytest.raises(SystemExit, match="2"):
        words = [BY_TORCH, option.format(folder)]
        main(["check", str(folder), *options, *words])
    said = capsys.readouterr()
    assert message in said.err and "Train it with" not in said.out
    assert not opened  # before anything is timed


def test_clusters_of_stage1_are_checked_too(folder, opened, capsys):
    cluster = "--ssps_cluster=!new:lgl_plugin.clustering.kmeans.TorchKMeans "
    words = ["--ssps_epochs=1", cluster + "{n_clusters: 18}"]
    with pytest.raises(SystemExit, match="2"):
        main(["check", str(folder), *TINY, BY_TORCH, *words])
    assert "or set ssps_epochs to 0" in capsys.readouterr().err
    assert not opened


def test_labels_of_utterances_out_of_the_sample_will_do(
    folder, opened, tmp_path
):
    labels = tmp_path / "labels.csv"
    labels.write_text("utterance,speaker\nbob/0.flac,Bob\nbob/1.wav,Bob\n")
    given = f"--labels_file={labels}"
    main(["check", str(folder), *TINY, LENIENT, given])
    assert len(opened) == 2


def test_the_channel_is_that_of_training(folder, opened, capsys):
    main(["check", str(folder), *TINY, LENIENT, "--channel=0"])
    assert [{*one.manifest.channels.tolist()} for one in opened] == [{0}, {0}]
    assert "--channel=0" in capsys.readouterr().out.splitlines()[-1]


def test_files_of_a_lower_rate_are_counted(folder, opened, capsys):
    wav, rate = soundfile.read(folder / "bob" / "0.wav")
    soundfile.write(folder / "bob" / "0.wav", wav, rate // 2)
    main(["check", str(folder), *TINY, LENIENT])
    printed = capsys.readouterr().out
    assert f"\nRates      1 files below {rate} Hz, the lowest 8000" in printed
    main(["check", str(folder), *TINY, LENIENT, "--sample_rate=8000"])
    assert "\nRates" not in capsys.readouterr().out


def test_the_folder_of_the_run_stays_as_it_is(audio, opened, tmp_path, capsys):
    word = f"--output_folder={tmp_path / 'run'}"
    main(["check", str(audio), *TINY, word])
    last = capsys.readouterr().out.splitlines()[-1]
    assert word in last and "=RUN" not in last
    assert opened and not any(tmp_path.iterdir())


def test_speakers_of_the_trial_list_are_not_counted(
    audio, opened, tmp_path, capsys
):
    """Nor is anything counted before a list that is not there."""
    listed = tmp_path / "trials.txt"
    words = ["check", str(audio), *TINY, f"--verification_file={listed}"]
    words += [f"--trial_folder={audio}"]
    with pytest.raises(SystemExit, match="2"):
        main(words)
    printed = capsys.readouterr()
    assert f"there is no file {listed}" in printed.err
    assert "files" not in printed.out
    listed.write_text("1 ann/0.wav ann/1.wav\n0 ann/0.wav ann/2.wav\n")
    main(words)
    capsys.readouterr()
    for session in opened:
        assert session.manifest.ids
        assert not any(n.startswith("ann") for n in session.manifest.ids)


def test_a_manifest_is_what_is_counted(audio, opened, tmp_path, capsys):
    rows = [
        f"{who} {n},0.5,$data_root/{who}/{n}.wav,0,8000,"
        for who in ("ann", "bob")
        for n in range(4)
    ]
    head = "ID,duration,wav,start,stop,spk_id"
    (tmp_path / "mine.csv").write_text("\n".join([head, *rows]))
    main(["check", str(audio), *TINY, *FEW, f"--manifest={tmp_path}/mine.csv"])
    printed = capsys.readouterr().out
    assert "8 files, 0.00 hours: 8 .wav" in printed
    assert "Not yet" not in printed and "both 8.0" in printed
    for session in opened:
        assert {name[:4] for name in session.manifest.ids} == {"ann ", "bob "}


def test_a_manifest_of_missing_files_is_refused(
    audio, opened, tmp_path, capsys
):
    rows = [f"{n},0.5,$data_root/ann/{n}.wav,0,8000," for n in range(9)]
    head = "ID,duration,wav,start,stop,spk_id"
    (tmp_path / "mine.csv").write_text("\n".join([head, *rows]))
    with pytest.raises(SystemExit, match="2"):
        main(
            [
                "check",
                str(audio),
                *TINY,
                *FEW,
                f"--manifest={tmp_path}/mine.csv",
            ]
        )
    said = capsys.readouterr()
    assert "more than the 0 that max_bad_share allows" in said.err
    assert "Train it with" not in said.out and not opened


def test_the_sample_of_a_manifest_is_of_whole_rows(audio, opened, tmp_path):
    """A cell of a further column may hold what splits lines."""
    note = "\u2028one\x85two"
    rows = [
        f'{who} {n},0.5,$data_root/{who}/{n}.wav,0,8000,,"a\n{note}"'
        for who in ("ann", "bob")
        for n in range(4)
    ]
    head = "ID,duration,wav,start,stop,spk_id,note"
    mine = tmp_path / "mine.csv"
    mine.write_text("\n".join([head, *rows]), encoding="utf-8")
    main(["check", str(audio), *TINY, *FEW, f"--manifest={mine}"])
    for session in opened:
        assert [*session.manifest.ids] == [row.split(",")[0] for row in rows]


def test_checkpoints_that_are_kept_take_room(monkeypatch, capsys, tmp_path):
    """A GiB of weights, of which the network is not made."""

    def said(**other):
        settings = mock.Mock(
            n_iterations=1,
            large_margin_epochs=0,
            embedding_size=1,
            freeze_batch_statistics=False,
            trained_weights=None,
            new_last_encoder=None,
            new_encoder=lambda: torch.nn.Linear(
                2**14, 2**14, bias=False, device="meta"
            ),
        )
        first = mock.Mock(stage=1, ssps_epochs=other.pop("ssps_epochs", 0))
        settings.configure_mock(stage=2, **other)
        sessions = iter(
            types.SimpleNamespace(settings=each, device="cpu")
            for each in (first, settings)
        )
        monkeypatch.setattr(cost, "open_session", lambda *_: next(sessions))
        cost.check_cost("", tmp_path, {"kept": 0}, CHOICES, [])
        (line,) = (
            line
            for line in capsys.readouterr().out.splitlines()
            if line.startswith("Disk")
        )
        return float(line.split()[2])

    for name in ("cost_of_stage1", "cost_of_stage2"):
        monkeypatch.setattr(cost, name, lambda session, made: {})
    # Of each of three phases: weights, and two checkpoints of three times that.
    assert said(keep_checkpoints=1) == 3 * 7
    assert said(keep_checkpoints=10) == 3 * 34
    assert said(keep_checkpoints=1, large_margin_epochs=1) == 4 * 7
    assert said(keep_checkpoints=1, ssps_epochs=5) == 4 * 7
    monkeypatch.setattr(cost, "peak_memory", lambda device: (None, 0))
    assert said(keep_checkpoints=1) == 3 * 7  # where memory cannot be told


CHOICES = {"preset": "small", "n_clusters": 3}


def test_fine_tuning_takes_time(monkeypatch):
    """On longer crops, in the last round alone."""
    monkeypatch.setattr(cost, "seconds_per_step", lambda *a, **k: 1.0)
    monkeypatch.setattr(cost, "speech_per_second", lambda *a: 1.0)

    def hours(epochs):
        settings = mock.Mock(
            n_iterations=2,
            freeze_batch_statistics=False,
            trained_weights=None,
            new_last_encoder=None,
            n_clusters=3,
            classifier_epochs=6,
            gated_epochs=4,
            crop_seconds=1.5,
            large_margin_crop_seconds=3.0,
            large_margin_epochs=epochs,
        )
        session = mock.Mock(settings=settings, rows=range(9))
        session.steps_per_epoch.return_value = 3600
        found = cost.cost_of_stage2(session, {"kept": 9, "hours": 0.0})
        return found["Stage II without clustering"]

    assert hours(0) == 20
    assert hours(5) == 20 + 5 * 2
