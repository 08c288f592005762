"""The verification command, against SpeechBrain's embeddings one by one."""

import argparse
import json
import pathlib
import shutil

import numpy as np
import pytest
import soundfile
import torch
from sklearn.cluster import AgglomerativeClustering
from speechbrain.inference.speaker import EncoderClassifier
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN

from lgl_plugin.cli import verify
from lgl_plugin.cli.main import main
from lgl_plugin.dataio.trials import Trials
from lgl_plugin.evaluation.verification import error_rates, rates_at
from lgl_plugin.inference.backends import Whitening
from lgl_plugin.inference.export import export_checkpoint
from lgl_plugin.inference.plda import fit_plda
from lgl_plugin.metrics.error_rates import eer
from lgl_plugin.report.verification import table
from lgl_plugin.runs.plain import plain_settings

RATE = 16000
TESTED, OTHERS, EACH = ("ann", "bob", "cat"), ("dan", "eve", "fay", "guy"), 3
NAMES = [f"{speaker}/{n}.wav" for speaker in TESTED for n in range(EACH)]
SETTINGS = """
stage: 1
seed: 1
sample_rate: 16000
new_encoder: !name:lgl_plugin.nnet.encoders.Encoder
    features: !name:speechbrain.lobes.features.Fbank {n_mels: 24}
    normalise: !name:speechbrain.processing.features.InputNormalization
        norm_type: sentence
        std_norm: False
    network: !name:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN
        input_size: 24
        channels: [8, 8, 8, 8, 24]
        attention_channels: 4
        lin_neurons: 6
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Speakers who differ in colour, and all trials of three of them."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for speaker in (*TESTED, *OTHERS):
        (folder / speaker).mkdir()
        colour = rng.normal(size=24)
        for n in range(EACH):
            noise = rng.normal(size=int(RATE * rng.uniform(0.4, 0.9)))
            wav = np.convolve(noise, colour + rng.normal(size=24))
            path = folder / speaker / f"{n}.wav"
            soundfile.write(path, 0.5 * wav / np.abs(wav).max(), RATE)
    lines = [
        f"{first[:3] == second[:3]:d} {first} {second}\n"
        for first in NAMES
        for second in NAMES
        if first < second
    ]
    (folder / "trials.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """An exported folder; its norms have seen speech's like."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    settings = plain_settings(SETTINGS)
    (parts,) = settings["new_encoder"].values()
    (arguments,) = parts["network"].values()
    model = ECAPA_TDNN(**arguments)
    for _ in range(20):
        model(torch.randn(8, 1, 24) + 2 * torch.randn(8, 60, 24))
    torch.save(model.state_dict(), folder / "encoder.ckpt")
    export_checkpoint(folder / "encoder.ckpt", settings, folder / "model")
    return folder / "model"


def unit(encoder, paths):
    """SpeechBrain's embeddings at length 1, float64."""
    model = EncoderClassifier.from_hparams(source=str(encoder))
    vectors = [
        model.encode_batch(torch.tensor(soundfile.read(path)[0])[None])[0, 0]
        for path in paths
    ]
    return torch.nn.functional.normalize(torch.stack(vectors).double()).numpy()


def run(encoder, corpus, output, *options):
    """The command; what it wrote."""
    main(
        ["verify", str(encoder), str(corpus)]
        + [f"--trials={corpus}/trials.txt", f"--output_folder={output}"]
        + ["--device=cpu", *options]
    )
    metrics = json.loads((output / "metrics.json").read_text())
    return metrics, [row.split() for row in open(output / "scores.txt")]


@pytest.mark.parametrize("with_cohort", [False, True])
def test_scores_and_error_rates(encoder, corpus, tmp_path, capsys, with_cohort):
    """Every trial against SpeechBrain's embeddings and plain sums."""
    # The folder of the trials too: whom they test on must stay out.
    options = [f"--cohort={corpus}", "--top=5"] if with_cohort else []
    metrics, rows = run(encoder, corpus, tmp_path / "out", *options)

    vectors = unit(encoder, [corpus / name for name in NAMES])
    vector = dict(zip(NAMES, vectors))
    expected = np.array([vector[a] @ vector[b] for a, b, *_ in rows])
    assert expected.std() > 0.05  # or there would be nothing to compare
    cosine = metrics["scores"]["cosine"]
    if with_cohort:
        paths = [corpus / s / f"{n}.wav" for s in OTHERS for n in range(EACH)]
        cohort = unit(encoder, paths)
        white = Whitening().fit(cohort)(vectors).astype(np.float64)
        white /= np.linalg.norm(white, axis=1, keepdims=True)
        white = dict(zip(NAMES, white))
        same = np.array([row[2] == "1" for row in rows])
        rate = eer([white[a] @ white[b] for a, b, *_ in rows], same)[0]
        assert metrics["scores"]["whitened"]["eer"] == pytest.approx(100 * rate)
        best = {n: np.sort(cohort @ v)[-5:] for n, v in vector.items()}
        mean = {name: top.mean() for name, top in best.items()}
        spread = {name: top.std(ddof=1) for name, top in best.items()}
        expected = [
            0.5 * sum((score - mean[side]) / spread[side] for side in sides)
            for score, sides in zip(expected, (row[:2] for row in rows))
        ]
        assert [*metrics["cohort"].values()] == [len(paths)]
        assert "9 files of the cohort, of 3 folders" in capsys.readouterr().out

    lines = (corpus / "trials.txt").read_text().splitlines()
    assert [f"{same} {a} {b}" for a, b, same, _ in rows] == lines
    scores = np.array([float(row[3]) for row in rows])
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-4)
    assert list(metrics["scores"]) == (
        ["cosine", "whitened", "AS-norm"] if with_cohort else ["cosine"]
    )
    final = metrics["scores"]["AS-norm"] if with_cohort else cosine
    same = np.array([row[2] == "1" for row in rows])
    assert (metrics["trials"], metrics["targets"]) == (len(same), same.sum())
    # The two error rates meet at the threshold, but for a trial of a kind.
    missed = 100 * np.mean(scores[same] <= final["threshold"])
    accepted = 100 * np.mean(scores[~same] > final["threshold"])
    assert missed == pytest.approx(final["eer"], abs=100 / same.sum())
    assert accepted == pytest.approx(final["eer"], abs=100 / same.sum())
    low, high = final["eer_interval"]
    assert 0 <= low <= final["eer"] <= high <= 100


def test_figures_and_table(encoder, corpus, tmp_path, capsys):
    run(encoder, corpus, tmp_path, f"--cohort={corpus}", "--top=5")
    assert (tmp_path / "det.png").read_bytes()[1:4] == b"PNG"
    assert b"<svg" in (tmp_path / "det.svg").read_bytes()
    printed = capsys.readouterr().out
    assert "9 target and 27 non-target trials" in printed
    assert "\n| cosine | " in printed and "\n| AS-norm | " in printed
    assert "\n| whitened | " in printed


def test_plda_by_the_clusters_of_a_cohort(
    encoder, corpus, tmp_path, capsys, monkeypatch
):
    """Of so few files an encoder finds no groups; then by four told."""
    cohort = f"--cohort={corpus}", "--top=5"
    metrics, _ = run(encoder, corpus, tmp_path / "none", *cohort)
    assert "PLDA" not in metrics["scores"]
    assert "No PLDA by the cohort: " in capsys.readouterr().out
    module = "lgl_plugin.report.verification"
    monkeypatch.setattr(f"{module}.count_speakers", lambda vectors: 4)
    metrics, rows = run(encoder, corpus, tmp_path / "four", *cohort)
    paths = [corpus / s / f"{n}.wav" for s in OTHERS for n in range(EACH)]
    others = unit(encoder, paths)
    white = Whitening(1.0).fit_transform(others)
    white /= np.linalg.norm(white, axis=1, keepdims=True)
    clusters = AgglomerativeClustering(4).fit_predict(white)
    tested = unit(encoder, [corpus / name for name in NAMES])
    sides = ([NAMES.index(row[side]) for row in rows] for side in (0, 1))
    scores = fit_plda(others, clusters).ratios(tested, *sides)
    rate = eer(scores, np.array([row[2] == "1" for row in rows]))[0]
    assert metrics["scores"]["PLDA"]["eer"] == pytest.approx(100 * rate)
    assert "\n| PLDA | " in capsys.readouterr().out


def test_what_the_encoders_threshold_does(encoder, corpus, tmp_path, capsys):
    """Counted trial by trial; AS-norm's scores are no cosines."""
    metrics, rows = run(encoder, corpus, tmp_path / "none")
    assert "encoder_threshold" not in metrics["scores"]["cosine"]
    assert "FA / FR" not in capsys.readouterr().out
    chosen = sorted(float(row[3]) for row in rows)[20]
    decided = tmp_path / "decided"
    shutil.copytree(encoder, decided)
    with open(decided / "hyperparams.yaml", "a") as yaml:
        yaml.write(f"threshold: {chosen}\n")
    cohort = f"--cohort={corpus}", "--top=5"
    metrics, _ = run(decided, corpus, tmp_path / "out", *cohort)
    found = metrics["scores"]["cosine"]
    wrong = {"0": [], "1": []}
    for *_, same, score in rows:
        wrong[same].append((float(score) >= chosen) != (same == "1"))
    accepted, rejected = (100 * np.mean(wrong[same]) for same in "01")
    one = 100 / len(wrong["1"])  # rounding of scores.txt may decide a trial
    assert found["encoder_threshold"] == chosen
    assert found["false_acceptance"] == pytest.approx(accepted, abs=one)
    assert found["false_rejection"] == pytest.approx(rejected, abs=one)
    assert 0 < found["false_acceptance"] < 100
    for other in ("whitened", "AS-norm"):
        assert "encoder_threshold" not in metrics["scores"][other]
    cell = f"{found['false_acceptance']:.2f} / {found['false_rejection']:.2f}"
    printed = capsys.readouterr().out
    assert f" | {cell} (at {chosen:.3f}) | " in printed
    assert "at the encoder's own threshold" in printed
    assert rates_at(0.5, [0.5, 0.5], np.array([True, False])) == {
        "encoder_threshold": 0.5,
        "false_acceptance": 100.0,
        "false_rejection": 0.0,
    }


def test_several_lists_and_encoders(encoder, corpus, tmp_path, capsys):
    """As each list by each encoder alone; utterances are embedded once."""
    other = tmp_path / "other" / encoder.name
    shutil.copytree(encoder, other)
    weights = torch.load(encoder / "embedding_model.ckpt", weights_only=True)
    torch.manual_seed(1)
    weights["fc.conv.weight"] += torch.randn_like(weights["fc.conv.weight"])
    torch.save(weights, other / "embedding_model.ckpt")
    lines = (corpus / "trials.txt").read_text().splitlines(keepends=True)
    lists = {"all": lines, "part": [line for line in lines if "ann" in line]}
    for name, part in lists.items():
        (tmp_path / f"{name}.txt").write_text("".join(part))
    given = [str(tmp_path / f"{name}.txt") for name in lists]
    out = tmp_path / "out"
    cohort = [f"--cohort={corpus}", "--top=5"]
    main(
        ["verify", str(encoder), str(other), str(corpus), "--trials", *given]
        + [f"--output_folder={out}", "--device=cpu", *cohort]
    )
    printed = capsys.readouterr().out
    assert printed.count("9 utterances embedded") == 2
    names = [f"{path.parent.name}-{path.name}" for path in (encoder, other)]
    for path, name in zip((encoder, other), names):
        for trials in lists:
            alone = tmp_path / f"{name}-{trials}"
            main(
                ["verify", str(path), str(corpus), "--trials"]
                + [str(tmp_path / f"{trials}.txt"), *cohort]
                + [f"--output_folder={alone}", "--device=cpu"]
            )
            scores = out / trials / name / "scores.txt"
            found = np.loadtxt(scores, usecols=3)
            expected = np.loadtxt(alone / "scores.txt", usecols=3)
            np.testing.assert_allclose(found, expected, atol=2e-5)
            metrics = json.loads((out / trials / "metrics.json").read_text())
            alone = json.loads((alone / "metrics.json").read_text())
            for kind in ("cosine", "whitened", "AS-norm"):
                rates = metrics["scores"][f"{name}, {kind}"]
                assert rates["eer"] == alone["scores"][kind]["eer"]
            assert f"| {trials} | {name}, cosine | " in printed
    assert (out / "part" / "det.png").exists()
    # Of fewer lists or encoders, or one more: what is there would stay.
    everything = [str(path) for path in (encoder, other)], given
    for encoders, trials in (
        (everything[0], given[:1]),
        (everything[0][:1], given),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(
                ["verify", *encoders, str(corpus), "--trials", *trials]
                + [f"--output_folder={out}", "--device=cpu"]
            )
        assert "scores.txt of an earlier call" in capsys.readouterr().err
    foreign = tmp_path / "foreign" / "metrics.json"
    foreign.parent.mkdir()
    foreign.write_text('{"mine": 1}')
    with pytest.raises(SystemExit, match="2"):
        main(
            ["verify", str(encoder), str(corpus), f"--trials={given[0]}"]
            + [f"--output_folder={foreign.parent}", "--device=cpu"]
        )
    assert "is no result of `lgl verify`" in capsys.readouterr().err
    assert foreign.read_text() == '{"mine": 1}'
    # A folder of its own is no other's, though it lies within.
    main(
        ["verify", str(encoder), str(corpus), f"--trials={given[0]}"]
        + [f"--output_folder={tmp_path}", "--device=cpu"]
    )


def test_a_channel_of_calls(encoder, corpus, tmp_path):
    """As that speaker alone, of the cohort too, and not as both mixed."""
    calls = tmp_path / "calls"
    for speaker in (*TESTED, *OTHERS):
        (calls / speaker).mkdir(parents=True)
        for n in range(EACH):
            name = f"{speaker}/{n}.wav"
            wav, _ = soundfile.read(corpus / name, dtype="int16")
            if n:  # a single channel is read as it is
                wav = np.c_[np.roll(wav, 500)[::-1], wav]
            soundfile.write(calls / name, wav, RATE)
    shutil.copy(corpus / "trials.txt", calls)

    def found(name, folder, *options):
        options = f"--cohort={folder}", "--top=5", *options
        return run(encoder, folder, tmp_path / name, *options)

    alone, mixed = found("alone", corpus), found("mixed", calls)
    one = found("one", calls, "--channel=1")
    assert one[1] == alone[1] != mixed[1]
    assert one[0]["scores"] == alone[0]["scores"]


def test_the_same_encoder_twice(encoder, corpus, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(
            ["verify", str(encoder), str(encoder), str(corpus), "--trials"]
            + [f"{corpus}/trials.txt", f"--output_folder={tmp_path}/out"]
        )
    assert "given twice" in capsys.readouterr().err


def test_the_yamls_own_paths_are_not_followed(encoder, corpus, tmp_path):
    """Those of a folder from the Hugging Face Hub name a repository there."""
    folder = tmp_path / "from_the_hub"
    shutil.copytree(encoder, folder)
    with open(folder / "hyperparams.yaml", "a") as yaml:  # ends in pretrainer
        yaml.write("    paths: {embedding_model: nobody/nothing/model.ckpt}\n")
    metrics, rows = run(folder, corpus, tmp_path / "out")
    assert rows == run(encoder, corpus, tmp_path / "again")[1]
    assert metrics["options"]["encoders"] == [str(folder)]


def test_bad_files_of_the_cohort(encoder, corpus, tmp_path, capsys):
    """No header: another is drawn. Silence shows later, and is named."""
    cohort = tmp_path / "cohort"
    for speaker in OTHERS:
        shutil.copytree(corpus / speaker, cohort / speaker)
        (cohort / speaker / "broken.wav").write_bytes(b"not audio")
        soundfile.write(cohort / speaker / "zeros.wav", np.zeros(RATE), RATE)
    size = len(OTHERS) * (EACH + 1)
    options = f"--cohort={cohort}", f"--cohort_utterances={size}", "--top=16"
    metrics, _ = run(encoder, corpus, tmp_path / "out", *options)
    assert [*metrics["cohort"].values()] == [len(OTHERS) * EACH]
    printed = capsys.readouterr().out
    assert "4 files of the cohort cannot be embedded" in printed
    assert "dan/zeros.wav is silent" in printed
    assert "--top=16: the cohort has 12" in printed


def test_a_small_cohort_counts_as_a_whole(encoder, corpus, tmp_path, capsys):
    cohort = f"--cohort={corpus}"
    metrics, rows = run(encoder, corpus, tmp_path / "default", cohort)
    assert "The cohort has 12 files, fewer than 300: all count" in (
        capsys.readouterr().out
    )
    assert metrics["options"]["top"] == 12
    given = cohort, "--top=12"
    assert rows == run(encoder, corpus, tmp_path / "given", *given)[1]
    assert "all count" not in capsys.readouterr().out


@pytest.mark.parametrize("usable", [0, 1, 3])
def test_a_cohort_that_gives_nothing_costs_no_result(
    encoder, corpus, tmp_path, capsys, usable
):
    """Files that are silent, or copies: that shows when all is embedded."""
    cohort = tmp_path / "cohort"
    (cohort / "dan").mkdir(parents=True)
    for n in range(EACH):
        shutil.copy(corpus / "dan" / "0.wav", cohort / "dan" / f"{n}.wav")
        if n >= usable:
            soundfile.write(cohort / "dan" / f"{n}.wav", np.zeros(RATE), RATE)
    options = f"--cohort={cohort}", "--top=3"
    metrics, rows = run(encoder, corpus, tmp_path / "out", *options)
    assert list(metrics["scores"]) == ["cosine"]
    assert [*metrics["cohort"].values()] == [usable]
    printed = capsys.readouterr().out
    assert rows == run(encoder, corpus, tmp_path / "alone")[1]
    if usable:
        for kind in ("whitened", "PLDA", "AS-norm"):
            assert f"No {kind} by the cohort: " in printed
    else:
        assert "No file of the cohort can be used" in printed


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_stereo(path):
    soundfile.write(path, np.ones((RATE, 2)) / 9, RATE)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda at: shutil.rmtree(at["encoder"]), "no such file or folder"),
        (
            lambda at: (at["encoder"] / "embedding_model.ckpt").unlink(),
            "holds no embedding_model.ckpt",
        ),
        (
            lambda at: write(at["encoder"] / "hyperparams.yaml", "modules: {}"),
            "its modules lack one of compute_features and embedding_model",
        ),
        (
            lambda at: torch.save({}, at["encoder"] / "embedding_model.ckpt"),
            "does not fit the ECAPA_TDNN",
        ),
        (lambda at: at.update(trials="no.txt"), "no file no.txt"),
        (lambda at: at.update(trials=at["audio"]), "wav is a folder"),
        (lambda at: at.update(audio="nowhere"), "no folder of audio nowhere"),
        (
            lambda at: (at["audio"] / "bob" / "1.wav").unlink(),
            "1 of the 9 utterances that",
        ),
        (
            lambda at: write(at["audio"] / "bob" / "1.wav", "no audio"),
            "bob/1.wav cannot be read",
        ),
        (lambda at: at.update(cohort="nowhere"), "no folder nowhere"),
        (
            lambda at: at.update(cohort=at["encoder"]),
            "no wav, flac, ogg or mp3",
        ),
        (
            lambda at: at.update(cohort=at["audio"] / "ann"),
            "that the trial list does not test on",
        ),
        (
            lambda at: (
                at.update(channel=2),
                write_stereo(at["audio"] / "bob" / "1.wav"),
            ),
            "bob/1.wav has 2 channels, numbered from 0, and no channel 2",
        ),
        (lambda at: at.pop("cohort"), "for a cohort: add --cohort"),
        (lambda at: at.update(top=13), "from 2 to the 12 files drawn from"),
        (lambda at: at.update(top=1), "--top=1 must be from 2"),
        (
            lambda at: [
                path.unlink()
                for speaker in OTHERS
                for path in (at["audio"] / speaker).iterdir()
                if (speaker, path.name) != ("dan", "0.wav")
            ],
            "1 files could be drawn from",
        ),
        (lambda at: at.update(device="cuda:99"), "finds no GPU here"),
    ],
)
def test_errors_come_before_anything_is_written(
    encoder, corpus, tmp_path, capsys, monkeypatch, spoil, message
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    at = {"encoder": tmp_path / "model", "audio": tmp_path / "wav"}
    shutil.copytree(encoder, at["encoder"])
    shutil.copytree(corpus, at["audio"])
    at |= {"trials": at["audio"] / "trials.txt"}
    at |= {"cohort": at["audio"], "top": 5, "device": "cpu"}
    spoil(at)
    places = ("encoder", "audio")
    options = [f"--{name}={at[name]}" for name in at if name not in places]
    with pytest.raises(SystemExit):
        main(
            ["verify", *(str(at[name]) for name in places), *options]
            + [f"--output_folder={tmp_path}/out", "--cohort_utterances=20"]
        )
    assert message in " ".join(capsys.readouterr().err.split())
    assert not pathlib.Path(tmp_path / "out").exists()


def test_results_are_not_written_among_a_runs_files(
    encoder, corpus, tmp_path, capsys
):
    write(tmp_path / "run" / "state.json", "{}")
    write(tmp_path / "file")
    for output, message in (
        ("run", "is a run's folder"),
        ("file", "a file is in the folder's place"),
    ):
        with pytest.raises(SystemExit):
            run(encoder, corpus, tmp_path / output)
        assert message in capsys.readouterr().err
    assert len(list((tmp_path / "run").iterdir())) == 1


def test_one_speaker_has_no_interval():
    """All joined by target trials: no speakers can be drawn."""
    sides = np.array([0, 1, 0]), np.array([1, 2, 2])
    trials = Trials(np.array([True, True, False]), list("abc"), *sides)
    rates = error_rates([0.9, 0.8, 0.1], trials)
    assert rates["eer"] == 0 and rates["eer_interval"] is None
    line = table({"one": {"scores": {"cosine": rates}}}).splitlines()[-1]
    assert line == "| cosine | 0.00 | 0.000 | 0.000 | 0.450 |"


def test_processes_that_read_audio_follow_the_device():
    """None at all would leave decoding to the process that computes."""
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    words = ["encoder", "audio", "--trials=list", "--output_folder=out"]
    assert parser.parse_args(words).num_workers is None
