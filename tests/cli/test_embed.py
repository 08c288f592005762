"""lgl embed: every file once, in the order of its list, resumably."""

import csv
import os
import shutil
import time

import numpy as np
import pytest
import soundfile
import torch

from lgl_plugin.cli.main import main
from lgl_plugin.dataio.audio import read_audio
from lgl_plugin.inference.backends import Whitening
from lgl_plugin.inference.export import InferenceModel
from lgl_plugin.inference.extractor import Extractor, load_extractor
from lgl_plugin.inference.store import Embeddings
from lgl_plugin.nnet.campplus import CAMPPlus
from lgl_plugin.runs.pretrained import encoder_settings
from lgl_plugin.runs.run import Run


def embed(encoder, audio, output, *options):
    words = map(str, (encoder, audio, output))
    main(["embed", *words, "--device=cpu", *options])


@pytest.mark.parametrize(
    "call",
    [
        "embed {} audio out",
        "who {} audio out",
        "compare {} one.wav other.wav",
        "verify {} audio --trials=list --output_folder=out",
        "attribute {} list audio --output_folder=out",
        "adapt {} audio --output_folder=out",
    ],
)
def test_the_folder_of_a_run_is_no_encoder(
    adapted, call, tmp_path, capsys, monkeypatch
):
    """The message names the encoder that lies in it, or why there is none."""
    monkeypatch.chdir(tmp_path)

    def said(folder):
        with pytest.raises(SystemExit, match="2"):
            main(call.format(folder).split())
        return capsys.readouterr().err

    assert f"as `lgl status {adapted}` says" in said(adapted)
    exported = adapted / "export" / "adapted"
    for name in ("hyperparams.yaml", "embedding_model.ckpt"):
        (exported / name).touch()
    for folder in (adapted, adapted / "export"):
        assert f"Name an encoder below it: {exported}" in said(folder)
    (adapted / "step").mkdir()  # a run's step, which compare cannot load
    for name in ("hyperparams.yaml", "embedding_model.ckpt"):
        (adapted / "step" / name).touch()
    assert f"below it: {exported}\n" in said(adapted)
    Run(tmp_path / "run", 1, {}).save()
    assert f"`lgl export {tmp_path}/run` writes" in said(tmp_path / "run")
    (tmp_path / "bare").mkdir()
    assert "`lgl export RUN` writes one" in said("bare")
    assert "nowhere: there is no such file or folder" in said("nowhere")


@pytest.mark.parametrize(
    "call",
    [
        "embed {encoder} {mine} {out}",
        "who {encoder} {mine} {out}",
        "adapt {encoder} {mine} --output_folder={out}",
        "train {mine} --output_folder={out}",
        "pack {trials} {out} --data_root={mine}",
        "verify {encoder} {mine} --trials {trials} --output_folder={out}",
        "attribute {encoder} {trials} {mine} --number=4 --output_folder={out}",
    ],
)
@pytest.mark.parametrize("place", ["", "ann"])
def test_nothing_is_written_among_the_recordings(
    encoder, audio, tmp_path, capsys, call, place
):
    mine = shutil.copytree(audio, tmp_path / "mine")
    before = sorted(mine.rglob("*"))
    trials = tmp_path / "trials.txt"
    trials.write_text("1 ann/0.wav ann/1.wav\n0 ann/0.wav bob/0.wav\n")
    words = call.format(
        encoder=encoder, mine=mine, out=mine / place, trials=trials
    ).split()
    with pytest.raises(SystemExit, match="2"):
        main(words)
    said = f"{mine / place} holds recordings, and "
    assert said in capsys.readouterr().err
    assert sorted(mine.rglob("*")) == before


@pytest.mark.parametrize("call", ["embed {} out", "who {} out", "adapt {}"])
def test_shards_are_for_training_alone(
    encoder, call, tmp_path, capsys, monkeypatch
):
    """None of these has a --manifest."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "shards.json").write_text("{}")
    words = call.format(f"{encoder} shards").split()
    words += ["--output_folder=out"] if words[0] == "adapt" else []
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--device=cpu"])
    said = capsys.readouterr().err
    assert "Name the recordings' folder" in said and "--manifest" not in said


def test_vectors_stand_in_the_order_of_their_names(encoder, audio, tmp_path):
    embed(encoder, audio, tmp_path)
    vectors = np.load(tmp_path / "vectors.npy")
    with open(tmp_path / "utterances.csv", newline="") as source:
        rows = list(csv.DictReader(source))
    assert len(rows) == len(vectors) == 16
    assert [int(row["row"]) for row in rows] == list(range(16))
    model = load_extractor(encoder).encoder.eval()
    for row, vector in zip(rows, vectors):
        wav = read_audio(audio / row["ID"])
        assert float(row["seconds"]) == pytest.approx(
            len(wav) / 16000, abs=1e-3
        )
        alone = model(wav[None], torch.ones(1))[0]
        np.testing.assert_allclose(vector, alone, rtol=1e-4, atol=1e-4)


def test_one_channel_of_a_call_is_embedded(encoder, audio, tmp_path, capsys):
    """As if the file had that channel alone; another has another folder."""
    calls, one = tmp_path / "calls", read_audio(audio / "ann" / "0.wav")
    calls.mkdir()
    other = read_audio(audio / "bob" / "0.wav")[: len(one)]
    both = np.stack([np.resize(other, len(one)), one], axis=1)
    soundfile.write(calls / "a.wav", both, 16000, subtype="FLOAT")
    found = []
    options = ["--channel=1"], ["--channel=0"], []
    for n, option in enumerate(options):
        out = tmp_path / f"out{n}"
        embed(encoder, calls, out, *option)
        found.append(Embeddings.load(out).vectors[0].copy())
        with pytest.raises(SystemExit, match="2"):
            embed(encoder, calls, out, *options[n - 1])
        was, now = (*option, "no --channel")[0], (*options[n - 1], "no")[0]
        said = capsys.readouterr().err
        assert f"embeddings with {was}, and this call has {now}" in said
        assert np.array_equal(Embeddings.load(out).vectors[0], found[-1])
    model = load_extractor(encoder).encoder.eval()
    for vector, wav in zip(found, (one, both[:, 0], both.mean(1))):
        wav = torch.as_tensor(wav, dtype=torch.float32)
        alone = model(wav[None], torch.ones(1))[0]
        np.testing.assert_allclose(vector, alone, rtol=1e-3, atol=1e-3)


def test_a_second_call_embeds_nothing(encoder, audio, tmp_path, monkeypatch):
    embed(encoder, audio, tmp_path)
    before = (tmp_path / "vectors.npy").stat().st_mtime_ns
    monkeypatch.setattr(Extractor, "__call__", pytest.fail)
    (tmp_path / "bad_files.txt").unlink()  # empty, and so of no use
    embed(encoder, audio, tmp_path)
    assert (tmp_path / "vectors.npy").stat().st_mtime_ns == before


def test_another_encoder_is_refused(encoder, audio, tmp_path, capsys):
    other, fewer = tmp_path / "other", tmp_path / "fewer"
    shutil.copytree(encoder, other)
    shutil.copytree(audio / "ann", fewer)
    embed(encoder, audio, tmp_path / "out")
    listed = (tmp_path / "out" / "manifest.csv").read_text()
    weights = other / "embedding_model.ckpt"
    torch.save({}, weights, _use_new_zipfile_serialization=False)  # other bytes
    with pytest.raises(SystemExit, match="2"):
        embed(other, fewer, tmp_path / "out")
    assert "another encoder" in capsys.readouterr().err
    # A back-end behind the same weights makes it another encoder, too.
    shutil.copy(encoder / weights.name, weights)
    torch.save({}, other / "backend.ckpt")
    with pytest.raises(SystemExit, match="2"):
        embed(other, audio, tmp_path / "out")
    assert "another encoder" in capsys.readouterr().err
    # The listing of the vectors stays beside them.
    assert (tmp_path / "out" / "manifest.csv").read_text() == listed


def test_what_cannot_be_read_is_named(encoder, audio, tmp_path):
    spoilt = tmp_path / "audio"
    shutil.copytree(audio, spoilt)
    (spoilt / "ann" / "0.wav").write_bytes(b"no audio")
    embed(encoder, spoilt, tmp_path / "out")
    found = Embeddings.load(tmp_path / "out")
    assert len(found.utterances) == 15
    assert "ann/0.wav\t" in (tmp_path / "out" / "bad_files.txt").read_text()


def test_no_setting_of_training_is_advised(encoder, audio, tmp_path, caplog):
    """A given encoder takes neither another rate nor a log_mel_share."""
    mine = tmp_path / "audio"
    shutil.copytree(audio / "ann", mine)
    wav, _ = soundfile.read(mine / "0.wav")
    soundfile.write(mine / "narrow.wav", wav, 8000)
    (mine / "call.m4a").touch()
    embed(encoder, mine, tmp_path / "out")
    assert "1 of 5 files are below 16000 Hz" in caplog.text
    assert "(1 .m4a). To have them read, convert them" in caplog.text
    assert "--" not in caplog.text and "lgl train" not in caplog.text


def test_no_number_of_bad_files_ends_the_work(encoder, audio, tmp_path, capsys):
    """More are bad than are listed, and one of the listed fails when read."""
    spoilt = tmp_path / "audio"
    shutil.copytree(audio, spoilt)
    for speaker in ("ann", "bob", "cat"):
        for n in range(3):
            (spoilt / speaker / f"{n}.wav").write_bytes(b"no audio")
    soundfile.write(spoilt / "dan" / "0.wav", np.zeros(16000), 16000)
    embed(encoder, spoilt, tmp_path / "out")
    assert len(Embeddings.load(tmp_path / "out").utterances) == 6
    lines = (tmp_path / "out" / "bad_files.txt").read_text().splitlines()
    assert len(lines) == 10 and lines[-1].startswith("dan/0.wav\tis silent")
    printed = capsys.readouterr().out
    assert "6 files, " in printed and "10 could not be used: " in printed


def test_audio_that_came_or_went_is_seen(encoder, audio, tmp_path):
    mine = tmp_path / "audio"
    shutil.copytree(audio, mine)
    embed(encoder, mine, tmp_path / "out")
    os.rename(mine / "ann" / "0.wav", mine / "ann" / "9.wav")
    embed(encoder, mine, tmp_path / "out")
    names = [*Embeddings.load(tmp_path / "out").utterances]
    assert len(names) == 16 and names[3] == "ann/9.wav"


def test_audio_that_was_replaced_is_embedded_again(encoder, audio, tmp_path):
    """Of the same length, so that the listing is as before."""
    mine, out = tmp_path / "audio", tmp_path / "out"
    shutil.copytree(audio, mine)
    embed(encoder, mine, out)
    before = np.load(out / "vectors.npy")
    wav, rate = soundfile.read(mine / "ann" / "0.wav", dtype="int16")
    soundfile.write(mine / "ann" / "0.wav", wav[::-1], rate)
    embed(encoder, mine, out)
    differ = (np.load(out / "vectors.npy") != before).any(axis=1)
    assert differ.tolist() == [True] + 15 * [False]


def test_a_repair_of_the_same_size_and_time_is_embedded(
    encoder, audio, tmp_path
):
    """Only decoding showed that the file was bad: the listing had it."""
    mine, out = tmp_path / "audio", tmp_path / "out"
    shutil.copytree(audio, mine)
    path = mine / "ann" / "0.wav"
    whole, times = path.read_bytes(), path.stat()
    for content, number in (
        (whole[:44].ljust(len(whole), b"\0"), 15),
        (whole, 16),
    ):
        time.sleep(0.02)  # a tick of the disk's clock
        path.write_bytes(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        embed(encoder, mine, out)
        assert len(Embeddings.load(out).utterances) == number
    assert not (out / "bad_files.txt").read_text()


def test_what_was_replaced_after_an_interruption_is_embedded_again(
    encoder, audio, tmp_path, monkeypatch
):
    """Of the same length: vectors that were kept are of the old audio."""
    mine, out = tmp_path / "audio", tmp_path / "out"
    shutil.copytree(audio, mine)
    bad, changed = mine / "dan" / "0.wav", mine / "ann" / "0.wav"
    good = bad.read_bytes()
    soundfile.write(bad, np.zeros(len(soundfile.read(bad)[0])), 16000)
    embed(encoder, mine, tmp_path / "before")

    def interrupted(self, *parts):
        embed_share(self, *parts).save()
        raise KeyboardInterrupt

    embed_share = Extractor._embed_share
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Extractor, "_embed_share", interrupted)
        embed(encoder, mine, out)
    bad.write_bytes(good)
    wav, rate = soundfile.read(changed, dtype="int16")
    soundfile.write(changed, wav[::-1], rate)
    embed(encoder, mine, out)
    embed(encoder, mine, tmp_path / "whole")
    found, whole, before = (
        Embeddings.load(tmp_path / name) for name in ("out", "whole", "before")
    )
    assert len(found.utterances) == 16 == len(before.utterances) + 1
    np.testing.assert_array_equal(found.vectors, whole.vectors)
    assert (found.vectors[0] != before.vectors[0]).any()


@pytest.mark.parametrize("name", ["vectors.npy", "manifest.csv"])
def test_files_of_others_are_not_replaced(
    encoder, audio, tmp_path, capsys, name
):
    (tmp_path / name).write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        embed(encoder, audio, tmp_path)
    assert f"{name}, which would be replaced" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_runs_folder_is_left_alone(encoder, audio, tmp_path, capsys):
    """It has a lock and a manifest, as embeddings have."""
    for name in (".lock", "manifest.csv", "state.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        embed(encoder, audio, tmp_path)
    assert "is a run's folder" in capsys.readouterr().err
    assert (tmp_path / "manifest.csv").read_text() == "{}"


def test_workers_are_by_default_those_that_help_says(encoder):
    count = min(8, os.cpu_count())
    for device, expected in (("cpu", 0), ("cuda", count)):
        extract = load_extractor(encoder, device, num_workers=None)
        assert extract.num_workers == expected


def test_audio_of_another_folder_is_refused(
    encoder, audio, tmp_path, capsys, monkeypatch
):
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(audio / "ann", here)
    embed(encoder, here, tmp_path / "out")
    with pytest.raises(SystemExit, match="2"):
        embed(encoder, audio, tmp_path / "out")
    printed = capsys.readouterr().err
    assert f"holds embeddings of {here}: name another folder" in printed
    here.rename(there)  # the same audio
    with monkeypatch.context() as patch:
        patch.setattr(Extractor, "__call__", pytest.fail)
        embed(encoder, there, tmp_path / "out")
    (there / "more.wav").write_bytes((there / "0.wav").read_bytes())
    embed(encoder, there, tmp_path / "out")
    assert len(Embeddings.load(tmp_path / "out").utterances) == 5


def test_audio_of_the_encoders_rate_is_not_converted(encoder, tmp_path, caplog):
    own = tmp_path / "encoder"
    shutil.copytree(encoder, own)
    yaml = (own / "hyperparams.yaml").read_text()
    (own / "hyperparams.yaml").write_text(f"sample_rate: 8000\n{yaml}")
    (tmp_path / "audio").mkdir()
    noise = np.random.default_rng(0).normal(size=8000) / 9
    soundfile.write(tmp_path / "audio" / "call.wav", noise, 8000)
    with caplog.at_level("INFO"):
        embed(own, tmp_path / "audio", tmp_path / "out")
    assert "they are converted" not in caplog.text


def test_no_audio(encoder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="2"):
        embed(encoder, tmp_path / "empty", tmp_path / "out")
    assert "no audio below" in capsys.readouterr().err


def test_weights_of_campplus_are_an_encoder(audio, tmp_path, capsys):
    network = CAMPPlus(80, 12, growth_rate=2, init_channels=4)
    path = tmp_path / "mine.pt"
    torch.save(network.state_dict(), path)
    embed(path, audio, tmp_path / "out")
    vectors = np.load(tmp_path / "out" / "vectors.npy")
    assert vectors.shape == (16, 12) and np.isfinite(vectors).all()
    files = [str(audio / "ann" / f"{n}.wav") for n in range(2)]
    main(["compare", str(path), *files])
    assert "say yours by --threshold" in capsys.readouterr().out
    main(["export", str(path), f"--output={tmp_path}/mine", "--threshold=0.5"])
    embed(tmp_path / "mine", audio, tmp_path / "again")
    again = np.load(tmp_path / "again" / "vectors.npy")
    np.testing.assert_array_equal(again, vectors)
    main(["compare", str(tmp_path / "mine"), *files])
    assert "threshold  0.500" in capsys.readouterr().out


def test_other_weights_are_refused_in_words(audio, tmp_path, capsys):
    path = tmp_path / "mine.pt"
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    for command in (
        ["embed", str(path), str(audio), str(tmp_path / "out")],
        ["export", str(path), f"--output={tmp_path}/mine"],
    ):
        with pytest.raises(SystemExit, match="2"):
            main(command)
        assert "--yaml" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["mine.pt"]


@pytest.mark.parametrize("kept", [0, 0.5])
def test_weights_that_are_cut_off_are_no_others(audio, tmp_path, capsys, kept):
    path = tmp_path / "mine.pt"
    network = CAMPPlus(80, 12, growth_rate=2, init_channels=4)
    torch.save(network.state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    for command in (
        ["embed", str(path), str(audio), str(tmp_path / "out")],
        ["export", str(path), f"--output={tmp_path}/mine"],
    ):
        with pytest.raises(SystemExit, match="2"):
            main(command)
        said = capsys.readouterr().err
        assert f"{path} cannot be read" in said and "cut off" in said


def test_a_backend_that_is_missing_is_named(audio, tmp_path, capsys):
    network, path = CAMPPlus(80, 12, growth_rate=2, init_channels=4), "mine.pt"
    torch.save(network.state_dict(), tmp_path / path)
    backend = Whitening().fit(np.random.default_rng(0).normal(size=(50, 12)))
    settings = encoder_settings(tmp_path / path)
    model = InferenceModel(settings, tmp_path / path, backend=backend)
    model.save(tmp_path / "mine", "card")
    (tmp_path / "mine" / "backend.ckpt").unlink()
    with pytest.raises(SystemExit, match="2"):
        embed(tmp_path / "mine", audio, tmp_path / "out")
    said = capsys.readouterr().err
    assert "backend.ckpt is missing" in said and "Errno" not in said
