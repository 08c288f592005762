"""lgl adapt: what wins is kept, and what does not changes nothing."""

import csv
import functools
import json
import re
import shutil
import types

import numpy as np
import pytest
import soundfile
import torch
from speechbrain.inference.speaker import SpeakerRecognition
from speechbrain.lobes.features import Fbank
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN

from lgl_plugin.adaptation import ladder as module
from lgl_plugin.adaptation.ladder import Ladder
from lgl_plugin.adaptation.rungs import BACKENDS
from lgl_plugin.adaptation.verdict import Verdict, count_speakers
from lgl_plugin.cli import adapt as verb, status
from lgl_plugin.cli.main import main
from lgl_plugin.dataio.given import read_names
from lgl_plugin.dataio.labels import read_labels
from lgl_plugin.dataio.manifest import load_manifest
from lgl_plugin.inference import folder
from lgl_plugin.inference.backends import Whitening, load_backend
from lgl_plugin.inference.extractor import load_extractor
from lgl_plugin.inference.store import Embeddings
from lgl_plugin.nnet.campplus import CAMPPlus
from lgl_plugin.runs.plain import plain_settings
from lgl_plugin.runs.pretrained import encoder_settings
from lgl_plugin.runs.run import Run
from lgl_plugin.runs.settings import load_settings
from lgl_plugin.runs.state import read_state
from lgl_plugin.utils.files import load_arrays

BETTER, WORSE = Verdict(20, 9.0, 4.0, -6.0, -4.0), Verdict(20, 4.0, 5.0, 0.5, 2)


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """Forty recordings of 1.2 s, as many voices, and a file of 0.1 s."""
    folder = tmp_path_factory.mktemp("calls")
    rng = np.random.default_rng(0)
    for n in range(40):
        wav = np.convolve(rng.normal(size=19200), rng.normal(size=24))
        soundfile.write(folder / f"{n}.wav", 0.05 * wav / wav.std(), 16000)
    soundfile.write(folder / "short.wav", np.ones(1600) / 9, 16000)
    return folder


@pytest.fixture(scope="module")
def ecapa(tmp_path_factory):
    """An untrained encoder as SpeechBrain's own folders have it."""
    folder = tmp_path_factory.mktemp("ecapa")
    (folder / "hyperparams.yaml").write_text(
        """
n_mels: 24
sample_rate: 16000
compute_features: !new:speechbrain.lobes.features.Fbank
    n_mels: !ref <n_mels>
mean_var_norm: !new:speechbrain.processing.features.InputNormalization
    norm_type: sentence
    std_norm: False
embedding_model: !new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN
    input_size: !ref <n_mels>
    channels: [8, 8, 8, 8, 24]
    attention_channels: 8
    lin_neurons: 16
modules:
    compute_features: !ref <compute_features>
    mean_var_norm: !ref <mean_var_norm>
    embedding_model: !ref <embedding_model>
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        embedding_model: !ref <embedding_model>
    paths:
        embedding_model: !ref nowhere/embedding_model.ckpt
"""
    )
    torch.manual_seed(0)
    network = ECAPA_TDNN(
        24,
        lin_neurons=16,
        channels=[8, 8, 8, 8, 24],
        attention_channels=8,
    )
    torch.save(network.state_dict(), folder / "embedding_model.ckpt")
    return folder


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """The recordings count as of eight speakers: they are of forty."""
    monkeypatch.setattr(module, "count_speakers", lambda vectors: 8)


def adapt(encoder, audio, folder, *options):
    main(
        [
            "adapt",
            *map(str, (encoder, audio)),
            f"--output_folder={folder}",
            "--device=cpu",
            *options,
        ]
    )


def say(monkeypatch, *verdicts):
    """Lets the judge say this, one after the other."""
    left = list(verdicts)
    monkeypatch.setattr(module, "judge", lambda *parts: left.pop(0))


def every_second(vectors, labelled, device):
    """Keeps half of the recordings without a label out of training."""
    return ~labelled & (np.cumsum(~labelled) % 2 == 0)


def test_speechbrain_loads_what_is_kept(
    ecapa, calls, tmp_path, monkeypatch, capsys
):
    """The network as it came, and behind it the last back-end that won."""
    say(monkeypatch, WORSE, BETTER)
    adapt(ecapa, calls, tmp_path / "run", "--labelled", "--license=mit")
    said = capsys.readouterr().out
    assert "Better with whitening:" in said and "9.0 % to 4.0 %" in said
    exported = tmp_path / "run" / "export" / "adapted"
    model = SpeakerRecognition.from_hparams(
        source=str(exported), savedir=str(tmp_path / "savedir")
    )
    wav, _ = soundfile.read(calls / "0.wav", dtype="float32")
    wav = torch.from_numpy(wav)[None]
    with torch.no_grad():
        bare = load_extractor(ecapa).encoder.eval()(wav)
    backend = load_backend(tmp_path / "run" / "whitening" / "backend.npz")
    np.testing.assert_allclose(
        model.encode_batch(wav)[0].numpy(), backend(bare), atol=1e-4
    )
    assert -1 < model.hparams.threshold < 1
    card = (exported / "README.md").read_text()
    assert "trained with speakers' labels" in card and "license: mit" in card
    assert "| centring | 4.0 | 5.0 | +0.5 to +2.0 | worse | no |" in card
    assert str(tmp_path) not in card
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "Better with whitening:" in page


TIE = Verdict(20, 4.0, 3.9, -1.0, 0.5)


@pytest.mark.parametrize("last", [BETTER, TIE])
def test_a_tie_of_backends_goes_to_the_one_that_wins_over_none(
    ecapa, calls, tmp_path, monkeypatch, last
):
    heard, left = [], [BETTER, TIE, last]

    def judge(before, after, n_speakers):
        heard.append((before, after))
        return left.pop(0)

    monkeypatch.setattr(module, "judge", judge)
    ladder = Ladder(ecapa, calls, tmp_path, "cpu")
    ladder.try_backends()
    assert [rung.kept for rung in ladder.rungs] == [True, last is BETTER]
    bare = ladder.embedded.of(ladder.judged)
    centred, white = (
        load_backend(tmp_path / name / "backend.npz")(bare)
        for name in ("centring", "whitening")
    )
    pairs = [(bare, centred), (centred, white), (bare, white)]
    for found, expected in zip(heard, pairs, strict=True):
        assert all(map(np.array_equal, found, expected))
    assert ladder.kind == ("whitening" if last is BETTER else "centring")
    assert np.array_equal(ladder.best, white if last is BETTER else centred)


def test_speakers_with_one_recording_each_are_refused(
    ecapa, calls, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(module, "count_speakers", count_speakers)
    with pytest.raises(SystemExit, match="2"):
        adapt(ecapa, calls, tmp_path)
    said = capsys.readouterr().err
    assert "no clear groups among 40 recordings" in said
    # This process holds the folder, as one under way would.
    monkeypatch.setattr("lgl_plugin.cli.status.writer_of", lambda folder: None)
    main(["status", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "failed     centring" in printed and "no clear groups" in printed
    assert "\nAdd recordings, then: " in printed
    say(monkeypatch, BETTER, WORSE)  # as of more recordings
    monkeypatch.setattr(module, "count_speakers", lambda vectors: 8)
    adapt(ecapa, calls, tmp_path)
    main(["status", str(tmp_path)])
    assert "failed" not in capsys.readouterr().out


def test_an_encoder_that_is_best_as_it_is_stays(
    ecapa, calls, tmp_path, monkeypatch, capsys
):
    """A rung that no verdict decided on is not said to be worse."""
    for case, second, words in (
        ("a", TIE, "recordings do not show that another encoder is better"),
        ("b", WORSE, "Your encoder is best as it is: each rung loses"),
    ):
        say(monkeypatch, WORSE, second)
        folder = tmp_path / case
        adapt(ecapa, calls, folder)
        assert words in capsys.readouterr().out
        assert not (folder / "export").exists()
        assert words in (folder / "report/index.html").read_text()


def test_it_goes_on_where_it_was_interrupted(
    ecapa, calls, tmp_path, monkeypatch, capsys
):
    """Nothing is embedded again, and the verdicts are those of before."""

    def fail(*parts):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "judge", fail)
    with pytest.raises(SystemExit, match="130"):
        adapt(ecapa, calls, tmp_path)
    capsys.readouterr()
    # This process holds the folder's lock.
    monkeypatch.setattr(status, "writer_of", lambda folder: None)
    main(["status", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "1 of 3 steps are done" in printed and "Go on with: " in printed
    assert "stopped    centring" in printed
    with monkeypatch.context() as patch:
        say(patch, WORSE, BETTER)
        patch.setattr(Ladder, "_read", fail)
        adapt(ecapa, calls, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "threshold_by_halves", fail)
        adapt(ecapa, calls, tmp_path)  # whose judge would fail
    state = json.loads((tmp_path / "state.json").read_text())
    assert state["done"]["whitening"]["high"] == -4.0


def test_another_backend_has_a_threshold_of_its_own(
    ecapa, calls, tmp_path, monkeypatch
):
    """Of the same kind, behind the same network: of another version, say."""
    found = iter([0.1, 0.2])
    monkeypatch.setattr(
        module, "threshold_by_halves", lambda *options: next(found)
    )
    say(monkeypatch, WORSE, BETTER, BETTER)
    for shrinkage, threshold in ((10.0, 0.1), (10.0, 0.1), (0.5, 0.2)):
        make = functools.partial(Whitening, shrinkage)
        monkeypatch.setitem(module.BACKENDS, "whitening", make)
        if threshold == 0.2:
            (tmp_path / "whitening" / "backend.npz").unlink()
        ladder = Ladder(ecapa, calls, tmp_path, "cpu")
        ladder.try_backends()
        assert ladder.export(tmp_path / "export") == threshold


def begin(encoder, audio, folder, patch):
    """Does a rung, from which on the folder is of this audio."""
    say(patch, WORSE, WORSE)
    Ladder(encoder, audio, folder, "cpu").try_backends()


def test_a_folder_is_of_one_encoder_and_of_one_corpus(
    ecapa, calls, audio, tmp_path, encoder, monkeypatch
):
    """Else the training in it would refuse, after all the other rungs."""
    moved = tmp_path / "moved"
    moved.symlink_to(calls)
    run = tmp_path / "run"
    begin(ecapa, calls, run, monkeypatch)
    before = (run / "manifest.csv").read_bytes()
    with pytest.raises(ValueError, match=f"another encoder than {encoder} .of"):
        Ladder(encoder, calls, run, "cpu")
    with pytest.raises(ValueError, match=f"other audio than {audio} has now"):
        Ladder(ecapa, audio, run, "cpu")
    assert (run / "manifest.csv").read_bytes() == before
    said = "with no --channel, and this call has --channel=0 .of which .*csv"
    with pytest.raises(ValueError, match=said):
        Ladder(ecapa, calls, run, "cpu", channel=0)
    Ladder(ecapa, moved, run, "cpu")
    Run(tmp_path / "other", 1, {}).save()
    with pytest.raises(ValueError, match="holds a training"):
        Ladder(ecapa, calls, tmp_path / "other", "cpu")


@pytest.mark.parametrize("name", ["vectors", "bad_files.txt"])
def test_files_of_others_are_not_replaced(
    ecapa, calls, audio, encoder, tmp_path, capsys, name
):
    """Neither those of `lgl embed`, whose folder has a lock, too."""
    if name == "vectors":
        name = "manifest.csv"
        main(["embed", str(encoder), str(audio), str(tmp_path), "--device=cpu"])
    else:
        (tmp_path / name).write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit, match="2"):
        adapt(ecapa, calls, tmp_path)
    said = capsys.readouterr().err
    assert name in said and "which would be replaced" in said
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_an_interrupted_listing_is_no_file_of_others(
    ecapa, calls, tmp_path, monkeypatch
):
    def interrupted(*options):
        folder.list_folder(*options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "list_folder", interrupted)
        Ladder(ecapa, calls, tmp_path, "cpu")
    assert (tmp_path / "manifest.csv").exists()
    assert len(Ladder(ecapa, calls, tmp_path, "cpu").manifest) == 40


def test_audio_that_came_is_refused(ecapa, calls, tmp_path, monkeypatch):
    mine, run = tmp_path / "mine", tmp_path / "run"
    shutil.copytree(calls, mine)
    begin(ecapa, mine, run, monkeypatch)
    (mine / "more.wav").write_bytes(b"no audio")  # which changes nothing
    Ladder(ecapa, mine, run, "cpu")
    shutil.copy(mine / "0.wav", mine / "new.wav")
    with pytest.raises(ValueError, match=f"other audio than {mine} has now"):
        Ladder(ecapa, mine, run, "cpu")


@pytest.mark.parametrize("number, said", [(9, "9 rec"), (30, "no clear")])
def test_audio_may_be_added_while_nothing_is_judged(
    ecapa, calls, encoder, tmp_path, monkeypatch, number, said
):
    """The message asked for more; the embeddings of before are not of it."""
    mine, run = tmp_path / "mine", tmp_path / "run"
    mine.mkdir()
    for n in range(number):
        shutil.copy(calls / f"{n}.wav", mine)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=said):
        patch.setattr(module, "count_speakers", count_speakers)
        Ladder(ecapa, mine, run, "cpu").try_backends()
    assert (run / "start" / "vectors.npy").exists() == (number == 30)
    if number == 30:
        with pytest.raises(ValueError, match="another encoder"):
            Ladder(encoder, mine, run, "cpu")
    shutil.copytree(calls, mine, dirs_exist_ok=True)
    begin(ecapa, mine, run, monkeypatch)
    begin(ecapa, mine, tmp_path / "fresh", monkeypatch)
    found, fresh = (
        Embeddings.load(tmp_path / name / "start") for name in ("run", "fresh")
    )
    assert [*found.utterances] == [*fresh.utterances]
    assert np.array_equal(found.vectors, fresh.vectors)


def test_audio_that_was_replaced_is_refused(
    ecapa, calls, tmp_path, monkeypatch
):
    """Of the same length, so that the listing is as before."""
    mine, run = tmp_path / "mine", tmp_path / "run"
    shutil.copytree(calls, mine)
    begin(ecapa, mine, run, monkeypatch)
    listed, bad = run / "manifest.csv", run / "bad_files.txt"
    with open(bad, "a") as out:
        out.write("1.wav\tcould not be embedded\n")
    before = listed.stat().st_mtime_ns, bad.read_text()
    wav, rate = soundfile.read(mine / "0.wav", dtype="int16")
    soundfile.write(mine / "0.wav", wav[::-1], rate)
    with pytest.raises(ValueError, match="has now, by the files' times"):
        Ladder(ecapa, mine, run, "cpu")
    assert (listed.stat().st_mtime_ns, bad.read_text()) == before


def test_backends_are_fitted_and_judged_on_all_recordings_up_to_a_limit(
    ecapa, calls, tmp_path, monkeypatch
):
    heard = []

    def judge(before, after, n_speakers):
        heard.append((len(before), len(after)))
        return WORSE

    monkeypatch.setattr(module, "judge", judge)
    monkeypatch.setattr(module, "JUDGED", 30)
    monkeypatch.setattr(module, "FITTED", 35)
    ladder = Ladder(ecapa, calls, tmp_path, "cpu")
    ladder.try_backends()
    assert [rung.name for rung in ladder.rungs] == list(BACKENDS)
    assert len(ladder.manifest) == 40 and heard == [(30, 30)] * 2
    order = np.random.default_rng(0).permutation(40)
    assert ladder.judged.tolist() == order[:30].tolist()
    assert sorted(ladder.embedded.rows) == sorted(order[:35])
    bare = ladder.embedded.vectors
    backend = load_backend(tmp_path / "whitening" / "backend.npz")
    fitted = BACKENDS["whitening"]().fit(bare)
    np.testing.assert_allclose(backend(bare), fitted(bare), atol=1e-5)


def test_an_adapted_encoder_can_be_adapted(ecapa, calls, tmp_path, monkeypatch):
    """Its back-end stays below what is added."""
    say(monkeypatch, BETTER, WORSE, WORSE, BETTER)
    adapt(ecapa, calls, tmp_path / "one")
    first = tmp_path / "one" / "export" / "adapted"
    adapt(first, calls, tmp_path / "two")
    second = load_extractor(tmp_path / "two" / "export" / "adapted")
    wav = torch.randn(1, 16000) / 9
    with torch.no_grad():
        before = load_extractor(first).encoder.eval()(wav).numpy()
        after = second.encoder.eval()(wav).numpy()
    backend = load_backend(tmp_path / "two" / "whitening" / "backend.npz")
    np.testing.assert_allclose(after, backend(before), atol=1e-4)


@pytest.mark.parametrize("number, option", [(9, ""), (16, "--train")])
def test_too_little_audio_is_said_at_once(
    ecapa, audio, tmp_path, capsys, monkeypatch, number, option
):
    some = tmp_path / "some"
    some.mkdir()
    for n, path in enumerate(sorted(audio.rglob("*.wav"))[:number]):
        shutil.copy(path, some / f"{n}.wav")
    with pytest.raises(SystemExit, match="2"):
        adapt(ecapa, some, tmp_path / "run", *filter(None, [option]))
    assert f"{number} recordings that can be used" in capsys.readouterr().err
    assert not (tmp_path / "run" / "start").exists()
    # This process holds the folder's lock.
    monkeypatch.setattr(status, "writer_of", lambda folder: None)
    main(["status", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    assert "stopped    start" in printed and "Stage II" not in printed


def test_the_network_is_trained_and_judged(
    ecapa, calls, tmp_path, monkeypatch, capsys
):
    """On what nothing is judged by; its own back-end goes behind it.

    A few labels are given: they are trained on, in clusters of their own.
    """
    say(monkeypatch, BETTER, WORSE, BETTER)
    monkeypatch.setattr(module, "kept_out", every_second)
    named = {f"{n}.wav": "ann" if n < 3 else "bob" for n in range(6)}
    lines = [f"{name},{speaker}" for name, speaker in named.items()]
    labels = tmp_path / "labels.csv"
    labels.write_text("\n".join(["utterance,speaker", *lines]))
    options = ["--steps_per_epoch=2", "--n_clusters=4", "--gated_epochs=1"]
    options += ["--crop_seconds=0.5", "--batch_size=8", "--noprogressbar"]
    options += [f"--labels={labels}"]
    adapt(ecapa, calls, tmp_path, "--train", *options)
    assert "--train has 0.0 hours of audio" in capsys.readouterr().err
    read = functools.partial(torch.load, weights_only=True)
    before, after = (
        read(tmp_path / name / "embedding_model.ckpt")
        for name in ("start", "loss_gate")
    )
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed and not [k for k in changed if "running_" in k]
    with open(tmp_path / "trained.csv", newline="", encoding="utf-8") as source:
        rows = list(csv.DictReader(source))
    split = load_arrays(tmp_path / "split" / "rows.npz")
    assert len(rows) == 40 - len(split["kept_out"]) == 23
    assert not any(row["spk_id"] for row in rows)
    ids = load_manifest(tmp_path / "manifest.csv", calls).ids
    assert {*named} <= {row["ID"] for row in rows}
    assert not {ids[n] for n in split["kept_out"]} & {row["ID"] for row in rows}
    (trained,) = tmp_path.glob("training-*")
    pseudo = trained / "iter1" / "labels"
    found = dict(zip(*read_labels(pseudo / "labels.csv")))
    assert {found[name] for name in named} == {0, 1}
    assert all(found[n] == ["ann", "bob"].index(s) for n, s in named.items())
    assert json.loads((pseudo / "labels.json").read_text())["speakers"] == [
        "ann",
        "bob",
    ]
    exported = tmp_path / "export" / "adapted"
    card = (exported / "README.md").read_text()
    assert "trained on by loss-gated learning" in card
    assert "6 have labels of 2 speakers that the training read" in card
    assert "# Speaker encoder adapted with few labels" in card
    page = (tmp_path / "report" / "index.html").read_text()
    assert "6 of 2 speakers" in page
    capsys.readouterr()
    # This process holds the folder's lock.
    monkeypatch.setattr(status, "writer_of", lambda folder: None)
    main(["status", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "5 of 5 steps are done" in printed
    assert "done       loss_gate            kept, better: 9.0" in printed
    assert f"lgl who {exported} AUDIO OUT" in printed
    wav = torch.randn(1, 16000) / 9
    found = load_extractor(exported)
    with torch.no_grad():
        vectors = found.encoder.eval()(wav)
        bare = load_extractor(ecapa).encoder.eval()
        bare.network.load_state_dict(after)
        backend = load_backend(tmp_path / "loss_gate" / "backend.npz")
        np.testing.assert_allclose(vectors, backend(bare(wav)), atol=1e-4)
    # Without --train no other encoder takes the trained one's place.
    with pytest.raises(SystemExit, match="2"):
        adapt(ecapa, calls, tmp_path)
    assert "add --train, which trains nothing" in capsys.readouterr().err
    assert (exported / "embedding_model.ckpt").exists()
    # A label is corrected: the same command begins a training of its own.
    labels.write_text("\n".join(["utterance,speaker", *lines[1:]]))
    say(monkeypatch, BETTER, WORSE, BETTER)
    adapt(ecapa, calls, tmp_path, "--train", *options)
    assert len([*tmp_path.glob("training-*")]) == 2


def test_other_settings_have_a_training_and_a_verdict_of_their_own(
    ecapa, calls, tmp_path, monkeypatch
):
    trained = []

    def train(ladder):
        trained.append(ladder.training.name)
        return ladder.weights

    for settings in ([], ["lr: was 0.1, is 0.2"], ["lr: was 0.1, is 0.2"]):
        say(monkeypatch, *[WORSE] * 3)
        monkeypatch.setattr(module, "kept_out", every_second)
        ladder = Ladder(ecapa, calls, tmp_path, "cpu")
        ladder.try_backends()
        ladder.try_training(train, settings)
    assert trained[0] == "training" and len(trained) == 2
    assert trained[1].startswith("training-")


def test_a_corrected_name_has_a_training_of_its_own(
    ecapa, calls, tmp_path, monkeypatch
):
    """The same recordings have a label, so that the split is the same."""
    monkeypatch.setattr(module, "kept_out", every_second)
    labels, trained = tmp_path / "labels.csv", []

    def train(ladder):
        trained.append(ladder.training.name)
        return ladder.weights

    for name in ("ann", "bob"):
        lines = ["utterance,speaker", "0.wav,ann", "1.wav,bob", f"2.wav,{name}"]
        labels.write_text("\n".join(lines))
        say(monkeypatch, *[WORSE] * 3)
        ladder = Ladder(ecapa, calls, tmp_path / "run", "cpu", labels=labels)
        ladder.try_backends()
        ladder.try_training(train)
    assert len(trained) == len({*trained}) == 2


def test_training_is_judged_by_speakers_that_it_did_not_read(
    ecapa, calls, tmp_path, monkeypatch, caplog
):
    """Only what is kept of it changes what the other rungs are judged by."""
    heard, left, counted = [], [WORSE, BETTER, WORSE], []

    def count(vectors):
        counted.append(vectors)
        return 8

    def judge(before, after, n_speakers):
        heard.append((before, after))
        return left.pop(0)

    monkeypatch.setattr(module, "judge", judge)
    monkeypatch.setattr(module, "count_speakers", count)
    monkeypatch.setattr(module, "kept_out", every_second)
    with caplog.at_level("INFO"):
        ladder = Ladder(ecapa, calls, tmp_path, "cpu", train=True)
        ladder.try_backends()
        judged, best = ladder.judged, ladder.best
        ladder.try_training(lambda ladder: ladder.weights)
    steps = "start", "centring", "whitening", "split", "loss_gate"
    for number, step in enumerate(steps, start=1):
        assert f"step {number} of 5: {step}" in caplog.text
    rows = load_arrays(tmp_path / "split" / "rows.npz")
    assert {*ladder.trained} == {*range(40)} - {*rows["kept_out"]}
    assert ladder.judged is judged and ladder.best is best
    before, after = heard[-1]
    # Behind the back-end that is kept; training left the network as it was.
    out = np.random.default_rng(0).permutation(rows["kept_out"])
    raw = ladder.embedded.of(out)
    np.testing.assert_allclose(before, ladder.backend(raw), atol=1e-5)
    # Speakers are counted on bare embeddings.
    np.testing.assert_allclose(counted[-1], raw, atol=1e-5)
    np.testing.assert_allclose(after, before, atol=1e-5)


@pytest.mark.parametrize("share, judged", [(0.5, 19), (0.02, None)])
def test_a_trained_network_may_fail_on_a_few_recordings(
    ecapa, calls, tmp_path, monkeypatch, share, judged
):
    heard = []

    def judge(before, after, n_speakers):
        heard.append((len(before), len(after)))
        return WORSE

    def read(self, extract, rows, folder):
        if folder.name == "loss_gate":
            rows = rows[rows != self.judged[0]]
        return whole(self, extract, rows, folder)

    whole = Ladder._read
    monkeypatch.setattr(Ladder, "_read", read)
    monkeypatch.setattr(module, "MOST_LOST", share)
    monkeypatch.setattr(module, "judge", judge)
    monkeypatch.setattr(module, "kept_out", every_second)
    ladder = Ladder(ecapa, calls, tmp_path, "cpu")
    ladder.try_backends()
    if judged:
        ladder.try_training(lambda ladder: ladder.weights)
        assert heard[-1] == (judged, judged)
    else:
        with pytest.raises(ValueError, match="1 of 20 recordings .* no finite"):
            ladder.try_training(lambda ladder: ladder.weights)


def test_recordings_that_no_rung_needed_are_embedded_for_the_split(
    ecapa, calls, tmp_path, monkeypatch
):
    say(monkeypatch, *[WORSE] * 3)
    monkeypatch.setattr(module, "FITTED", 30)
    monkeypatch.setattr(module, "kept_out", every_second)
    ladder = Ladder(ecapa, calls, tmp_path, "cpu")
    ladder.try_backends()
    assert len(ladder.embedded.rows) == 30
    ladder.try_training(lambda ladder: ladder.weights)
    found = Embeddings.load(tmp_path / "split").utterances
    assert {*found} == {ladder.manifest.ids[row] for row in ladder.order[30:]}
    rows = load_arrays(tmp_path / "split" / "rows.npz")
    assert {*rows["kept_out"]} | {*rows["trained"]} == {*range(40)}


def test_training_gets_only_what_can_be_read(
    ecapa, calls, tmp_path, monkeypatch
):
    """The other rungs pass over files that would end it; so do the labels."""
    mine, labels = tmp_path / "mine", tmp_path / "labels.csv"
    shutil.copytree(calls, mine)
    for name in ("3.wav", "17.wav"):  # listed, since a header says all is well
        soundfile.write(mine / name, np.zeros(19200), 16000)
    lines = ["utterance,speaker", "3.wav,ann", "4.wav,ann", "5.wav,bob"]
    labels.write_text("\n".join(lines))
    listed = []

    def train(ladder):
        paths = tmp_path / "trained.csv", tmp_path / "known.csv"
        ladder.list_trained(*paths)
        listed.extend(load_manifest(paths[0], mine).ids)
        listed.append(read_names(paths[1]))
        return ladder.weights

    say(monkeypatch, *[WORSE] * 3)
    monkeypatch.setattr(module, "kept_out", every_second)
    ladder = Ladder(ecapa, mine, tmp_path / "run", "cpu", labels=labels)
    ladder.try_backends()
    ladder.try_training(train)
    *names, known = listed
    assert len(ladder.manifest) == 40 and {"4.wav", "5.wav"} <= {*names}
    assert not {"3.wav", "17.wav"} & {*names}
    assert known == {"4.wav": "ann", "5.wav": "bob"}
    bad = (tmp_path / "run" / "bad_files.txt").read_text()
    assert "3.wav\tis silent" in bad and "17.wav\tis silent" in bad
    labels.write_text("\n".join([*lines[:2], lines[3]]))
    say(monkeypatch, *[WORSE] * 3)
    ladder = Ladder(ecapa, mine, tmp_path / "run", "cpu", labels=labels)
    ladder.try_backends()
    with pytest.raises(ValueError, match="labelled 'ann' can be read"):
        ladder.try_training(train)


def test_labels_of_all_clusters_leave_nothing_to_judge_training_by(
    ecapa, calls, tmp_path, monkeypatch
):
    say(monkeypatch, WORSE, WORSE)
    monkeypatch.setattr(
        module, "kept_out", lambda found, known, device: known & ~known
    )
    ladder = Ladder(ecapa, calls, tmp_path, "cpu")
    ladder.try_backends()
    with pytest.raises(
        ValueError, match="0 recordings .* takes 10: their clus"
    ):
        ladder.try_training(lambda ladder: ladder.weights)
    failed = read_state(tmp_path)["failed"]
    assert [*failed] == ["split"] and "0 recordings" in failed["split"]


@pytest.mark.parametrize("first", [BETTER, WORSE])
def test_a_training_that_fails_leaves_what_the_other_rungs_gave(
    ecapa, calls, tmp_path, monkeypatch, capsys, first
):
    exported = tmp_path / "export" / "adapted"
    page = tmp_path / "report" / "index.html"
    say(monkeypatch, first, WORSE, WORSE)
    monkeypatch.setattr(
        module, "kept_out", lambda found, known, device: known & ~known
    )
    with pytest.raises(SystemExit, match="1"):
        adapt(ecapa, calls, tmp_path, "--train")
    said = capsys.readouterr().err
    assert "--train: 0 recordings are of speakers" in said
    assert "What came before it is kept. " in said and str(page) in said
    assert (str(exported) in said) == exported.exists() == (first is BETTER)
    assert "best as it is" in page.read_text() or first is BETTER

    def fail(ladder, given):
        raise ValueError("no such thing")

    monkeypatch.setattr(module, "kept_out", every_second)
    monkeypatch.setattr(verb, "train_network", lambda ladder, given: weights)
    weights = tmp_path / "start" / "embedding_model.ckpt"
    adapt(ecapa, calls, tmp_path, "--train")
    before = page.read_bytes()
    assert b"loss_gate" in before
    # Other settings: what the first training gave stays.
    monkeypatch.setattr(verb, "train_network", fail)
    with pytest.raises(SystemExit, match="1"):
        adapt(ecapa, calls, tmp_path, "--train", "--lr=0.2")
    said = capsys.readouterr().err
    assert (
        "no such thing\nWhat came before it is kept. The result so far is in "
        f"{tmp_path}" in said
    )
    assert page.read_bytes() == before


def test_an_error_of_the_recipe_is_one_of_training(
    ecapa, calls, tmp_path, monkeypatch, capsys
):
    """With its message, and not that of a wrong call."""
    say(monkeypatch, BETTER, WORSE)
    monkeypatch.setattr(module, "kept_out", every_second)
    with pytest.raises(SystemExit, match="1"):
        adapt(ecapa, calls, tmp_path, "--train", "--min_cluster_size=20")
    said = capsys.readouterr().err
    assert re.search("lgl adapt: --train: .*no cluster has 20", said)
    assert "What came before it is kept" in said
    assert (tmp_path / "export" / "adapted" / "hyperparams.yaml").exists()


def test_what_training_is_given(tmp_path, monkeypatch):
    """Paths as they were typed, and the processes that read audio."""
    given = []
    recipe = types.SimpleNamespace(train=lambda *words: given.append(words))
    monkeypatch.setattr(verb, "load_recipe", lambda: recipe)
    folder = tmp_path / "a: b=c #1"
    steps = ["iter2/gated", "iter10/gated", "iter10/large_margin"]
    left = [
        folder / "training" / step / "embedding_model.ckpt" for step in steps
    ]
    for path in left:
        path.parent.mkdir(parents=True)
        path.touch()
    settings = {"n_iterations": 10, "large_margin_epochs": 1}

    def finish(steps):
        """The order is not that of the steps: one may be done again."""
        names = ("inputs", "sources", "failed", "files")
        state = {name: {} for name in names}
        state |= {"settings": {"stage 2": settings}}
        state |= {"done": dict.fromkeys(steps, {})}
        (folder / "training" / "state.json").write_text(json.dumps(state))

    finish(steps[1::-1])
    network = {"!name:mine.Encoder": {"width": 8}}
    ladder = types.SimpleNamespace(
        training=folder / "training",
        folder=folder,
        audio=folder,
        weights=folder / "weights.ckpt",
        settings={"new_encoder": network, "sample_rate": 8000},
        embedded=types.SimpleNamespace(vectors=np.zeros((1, 16))),
        trained=range(10),
        given="labels of some",
        extract=types.SimpleNamespace(
            num_workers=8,
            encoder=types.SimpleNamespace(network=torch.nn.BatchNorm1d(3)),
        ),
        device="cpu",
        list_trained=lambda path, labels: None,
    )
    words = ["--lr=0.1", "--batch_size=4"]
    assert verb.train_network(ladder, words) == left[1]  # the last round's
    ((_, options, overrides),) = given
    found = plain_settings(overrides)
    assert found["data_folder"] == str(folder)
    assert found["manifest"] == str(folder / "trained.csv")
    assert found["labels_file"] == str(folder / "trained_labels.csv")
    assert found["new_encoder"] == network and found["lr"] == 0.1
    assert found["batch_size"] == 4
    assert "freeze_batch_statistics" not in found  # as the yaml has it
    assert found["dataloader_options"] == {"num_workers": 8}
    assert options["device"] == "cpu"
    # Weights of CAM++ say themselves what they are of: that is no setting.
    network = CAMPPlus(80, 12, growth_rate=2, init_channels=4)
    torch.save(network.state_dict(), ladder.weights)
    ladder.settings = encoder_settings(ladder.weights)
    finish(steps[::-1])
    assert verb.train_network(ladder, []) == left[2]
    path, options, overrides = given[-1]
    assert "new_encoder" not in plain_settings(overrides)
    settings, _ = load_settings(path, overrides, options)
    assert type(settings.new_encoder().network) is CAMPPlus
    assert settings.embedding_size == 12 and settings.freeze_batch_statistics
    # They do not say of which features: another folder's are kept.
    (parts,) = ladder.settings["new_encoder"].values()
    parts["features"] = {
        "!name:speechbrain.lobes.features.Fbank": {"n_mels": 80}
    }
    ladder.settings["sample_rate"] = 8000
    ladder.embedded.vectors = np.zeros((1, 12))
    verb.train_network(ladder, [])
    path, options, overrides = given[-1]
    settings, _ = load_settings(path, overrides, options)
    assert type(settings.new_encoder().features) is Fbank
    assert settings.sample_rate == 8000 and settings.embedding_size == 12
    ladder.extract.encoder.network = torch.nn.Linear(3, 3)
    verb.train_network(ladder, [])
    assert plain_settings(given[-1][2])["freeze_batch_statistics"] is False


def test_settings_are_compared_with_the_yamls(tmp_path):
    given = ["--lr=0.2", "--ckpt_interval_minutes=1", "--noprogressbar"]
    (line,) = verb.check_settings(str(tmp_path), given)
    assert line == "lr: was 0.0001, is 0.2"
    # It may be for the given encoder, which is not the yaml's.
    given = ["--new_classifier={input_size: 512}"]
    (line,) = verb.check_settings(str(tmp_path), given)
    assert line.endswith("was 192, is 512")


def test_what_is_kept_no_more_is_offered_no_more(
    ecapa, calls, tmp_path, monkeypatch, capsys
):
    say(monkeypatch, BETTER, WORSE)
    adapt(ecapa, calls, tmp_path)
    exported = tmp_path / "export" / "adapted"
    assert exported.exists()
    (tmp_path / "centring" / "backend.npz").unlink()
    say(monkeypatch, WORSE)
    adapt(ecapa, calls, tmp_path)
    assert not exported.exists()
    exported.mkdir()
    (exported / "hyperparams.yaml").touch()
    capsys.readouterr()
    # This process holds the folder's lock.
    monkeypatch.setattr(status, "writer_of", lambda folder: None)
    main(["status", str(tmp_path)])
    assert "No rung is kept" in capsys.readouterr().out


def test_labels_must_leave_enough_to_judge_on(ecapa, calls, tmp_path, capsys):
    labels = tmp_path / "labels.csv"
    lines = [f"{n}.wav,ann" for n in range(31)]
    labels.write_text("\n".join(["utterance,speaker", *lines]))
    with pytest.raises(SystemExit, match="2"):
        adapt(ecapa, calls, tmp_path, "--train", f"--labels={labels}")
    assert "leaves 9 recordings without a label" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option, said",
    [
        # Of 40, 20 may be kept out, and 2 of the others are held out.
        ("--batch_size=19", "Lower batch_size"),
        ("--held_out_share=0.95", "too few"),
        ("--grad_accumulation_factor=51", "grad_accumulation_factor: 51"),
        ("--n_clusters=21", "n_clusters=21 is more than the 20"),
        ("--min_cluster_size=21", "min_cluster_size: 21 is more than the 20"),
        ("--batch_size=18", None),
    ],
)
def test_sizes_that_training_cannot_do_with_show_before_the_work(
    ecapa, calls, tmp_path, monkeypatch, capsys, option, said
):
    class Begun(BaseException):
        """The work has begun."""

    def begin(ladder):
        raise Begun

    monkeypatch.setattr(Ladder, "_start", begin)
    with pytest.raises(SystemExit if said else Begun):
        adapt(ecapa, calls, tmp_path, "--train", option)
    printed = capsys.readouterr().err
    assert said is None or said in printed
    assert ("only 20 of the 40 recordings" in printed) == bool(said)


def test_weights_that_the_encoder_lacks_show_before_the_work(
    ecapa, calls, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(Ladder, "_start", pytest.fail)
    with pytest.raises(SystemExit, match="2"):
        adapt(ecapa, calls, tmp_path, "--train", "--trained_weights=dense")
    said = capsys.readouterr().err
    assert "no weight of the encoder has 'dense' in its name" in said
    assert "blocks.0, " in said and "fc.conv" in said
    monkeypatch.setattr("lgl_plugin.nnet.encoders.batch_norms", lambda _: [])
    frozen = "--freeze_batch_statistics=True"
    with pytest.raises(SystemExit, match="2"):
        adapt(ecapa, calls, tmp_path, "--train", frozen)
    assert "has no batch normalisation" in capsys.readouterr().err


def test_a_training_that_was_not_kept_leaves_the_folder_open(
    ecapa, calls, tmp_path, monkeypatch
):
    """The same command without --train takes nothing from it."""
    weights = tmp_path / "start" / "embedding_model.ckpt"
    monkeypatch.setattr(verb, "train_network", lambda ladder, given: weights)
    monkeypatch.setattr(module, "kept_out", every_second)
    say(monkeypatch, BETTER, WORSE, WORSE)
    adapt(ecapa, calls, tmp_path, "--train")
    before = (tmp_path / "export/adapted/backend.ckpt").read_bytes()
    adapt(ecapa, calls, tmp_path)
    after = (tmp_path / "export/adapted/backend.ckpt").read_bytes()
    assert before == after


def test_settings_of_training_are_refused_without_it(
    ecapa, calls, tmp_path, capsys
):
    with pytest.raises(SystemExit, match="2"):
        adapt(ecapa, calls, tmp_path, "--labels=labels.csv")
    assert "--labels are for training alone" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        adapt(ecapa, calls, tmp_path, "--lr=0.1")
    assert "--lr=0.1 is a setting of training" in capsys.readouterr().err
    for train in ([], ["--train"]):
        with pytest.raises(SystemExit, match="2"):
            adapt(ecapa, calls, tmp_path, *train, "--lrr=0.1")
        assert "did you mean 'lr'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        adapt(ecapa, calls, tmp_path, "--train", "--labels_file=mine.csv")
    assert "--labels has the labels" in capsys.readouterr().err
    within = "--dataloader_options={batch_size: 8}"
    for train in ([], ["--train"]):
        with pytest.raises(SystemExit, match="2"):
            adapt(ecapa, calls, tmp_path, *train, within)
        said = capsys.readouterr().err
        assert f"{within}: name the batch by --batch_size=8 instead" in said
    outside = "--allow_outside_data_folder=True"
    with pytest.raises(SystemExit, match="2"):
        adapt(ecapa, calls, tmp_path, "--train", outside)
    assert f"{outside}: all audio lies in" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
