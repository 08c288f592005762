"""lgl train against the recipe's two commands, and its resumption."""

import json
import re
import subprocess
import sys

import pytest
from tiny import STAGE1, STAGE2, TINY

from lgl_plugin.cli.main import main
from lgl_plugin.dataio.audio import BadAudio
from lgl_plugin.runs.metrics_log import read_metrics

# What tells of the clock and not of the run.
TIMES = ("seconds", "utterances_per_second")


def words(corpus, output, *options):
    """The arguments that a user gives `lgl`."""
    options = [
        *(*TINY, *STAGE1, *STAGE2, f"--data_folder={corpus}"),
        f"--verification_file={corpus}/trials.txt",
        *("--speaker_folder=True", *options),
    ]
    options = {option.split("=")[0]: option for option in options}.values()
    usual = [f"--output_folder={output}", "--preset=small"]
    return ["train", f"{corpus}/wav", *usual, *options]


def refused(capsys, *given):
    """Returns the output of a call that must be refused."""
    with pytest.raises(SystemExit, match="2"):
        main(words(*given))
    return "".join(capsys.readouterr())


def figures(folder):
    """A run's records without times."""
    return [
        {key: value for key, value in record.items() if key not in TIMES}
        for record in read_metrics(folder)
    ]


def test_one_job_is_the_two_commands(run, corpus, tmp_path):
    """Bit for bit; and the same command again trains nothing."""
    typed = words(corpus, tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-m", "lgl_plugin", *typed],
        capture_output=True,
        text=True,
        timeout=300,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-3000:]
    assert figures(tmp_path / "run") == figures(run)
    for line in (
        "step 1 of 10: baselines",
        "stage1: epoch 1 of 2, loss ",
        "step 10 of 10: iter2/gated",
    ):
        assert printed.count(line) == 1
    assert "%|" not in printed  # no bar, as --noprogressbar asks
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    main(typed)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_an_error_of_stage2_comes_before_stage1(corpus, tmp_path, capsys):
    printed = refused(capsys, corpus, tmp_path / "run", "--n_iterations=0")
    assert "n_iterations" in printed and "Traceback" not in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "option, message",
    [
        ("--n_clusters=1000", "n_clusters=1000 is more than the"),
        ("--labels_file={}", "labels 1 utterances that are not there"),
    ],
)
def test_what_stage2_cannot_do_with_the_audio_is_said_before_stage1(
    option, message, corpus, tmp_path, capsys
):
    labels = tmp_path / "labels.csv"
    labels.write_text("utterance,speaker\nnobody.wav,ann\n")
    run = tmp_path / "run"
    assert message in refused(capsys, corpus, run, option.format(labels))
    assert not (run / "baselines").exists() and not (run / "stage2").exists()


def test_a_labelled_speaker_who_cannot_be_read_is_named_before_stage1(
    corpus, tmp_path, capsys, monkeypatch
):
    """Such as by files that are silent, which the listing does not hear."""
    folder = corpus / "wav"
    names = [p.relative_to(folder) for p in sorted(folder.rglob("*.wav"))]
    tested = (corpus / "trials.txt").read_text()
    names = [n for n in names if n.parts[0] not in tested]
    labels = tmp_path / "labels.csv"
    lines = [f"{name},ann" for name in names[:2]] + [f"{names[-1]},bob"]
    labels.write_text("\n".join(["utterance,speaker", *lines]))

    def read(wav, **_):
        if wav.endswith(str(names[-1])):
            raise BadAudio("is silent")

    monkeypatch.setattr("lgl_plugin.training.start.read_beginning", read)
    option = f"--labels_file={labels}"
    said = refused(capsys, corpus, tmp_path / "run", option)
    assert "no utterance that is labelled 'bob' can be read" in said


def test_an_error_behind_the_preparation_is_a_message(corpus, tmp_path, capsys):
    printed = refused(capsys, corpus, tmp_path, "--batch_size=4000")
    assert "Traceback" not in printed
    assert re.search("^lgl train: .*Lower batch_size", printed, re.M)
    choices = json.loads((tmp_path / "train.json").read_text())
    assert choices["preset"] == "small"
