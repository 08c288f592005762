"""lgl attribute: a page, its numbers, and the refusal of too few steps."""

import csv
import json
import weakref

import numpy as np
import pytest
import soundfile

from lgl_plugin.cli.main import main
from lgl_plugin.inference.attribution import Explainer
from lgl_plugin.report.attribution import attribute, draw


@pytest.fixture(scope="module")
def trials(audio, tmp_path_factory):
    path = tmp_path_factory.mktemp("trials") / "trials.txt"
    lines = [f"1 {s}/0.wav {s}/{n}.wav" for s in ("ann", "bob") for n in (1, 2)]
    lines += [f"0 ann/0.wav {s}/1.wav" for s in ("bob", "cat", "dan")]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_page_and_its_numbers(
    encoder, audio, trials, tmp_path, capsys, monkeypatch
):
    explain, made = Explainer.__call__, []

    def remembered(self, *wavs):
        # Minutes of audio by thousands of trials would not fit into memory.
        assert sum(found() is not None for found in made) <= 1
        found = explain(self, *wavs)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(Explainer, "__call__", remembered)
    out = tmp_path / "out"
    arguments = [str(encoder), str(trials), str(audio)]
    options = [f"--output_folder={out}", "--number=5", "--device=cpu"]
    main(["attribute", *arguments, *options])
    printed = capsys.readouterr().out
    assert printed.count(" off with ") == 2 * 5
    facts = json.loads((out / "attribution.json").read_text())
    assert facts["trials"] == 5 and facts["targets"] == 3
    with open(out / "trials.csv", newline="") as source:
        header, *rows = csv.reader(source)
    assert len(rows) == 5 and rows[0][0] == "target"
    numbers = np.genfromtxt(
        out / "bands_features.csv", delimiter=",", names=True
    )
    changes = [
        float(row[header.index("score")])
        - float(row[header.index("features, baseline")])
        for row in rows
    ]
    change = numbers["target"].sum()
    assert change == pytest.approx(np.mean(changes[:3]), rel=0.06, abs=0.006)
    added = facts["added"]["features"].values()
    assert sum(a["target"][0] for a in added) == pytest.approx(change, abs=1e-4)
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "could not be made" not in page
    assert page.count("<figure>") == 2 + 2 + 4
    for name in ("Which bands", "When", "Examples", "Completeness"):
        assert f">{name}</h2>" in page
    assert "Which layers" not in page


def test_too_few_steps_are_refused(encoder, audio, trials, tmp_path, capsys):
    arguments = [str(encoder), str(trials), str(audio), "--steps=1"]
    with pytest.raises(SystemExit, match="2"):
        main(["attribute", *arguments, f"--output_folder={tmp_path / 'out'}"])
    assert "give more steps, such as 4" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [-3, 3])
def test_too_few_trials_are_refused_at_once(tmp_path, capsys, number):
    arguments = ["encoder", "trials", "audio", f"--number={number}"]
    with pytest.raises(SystemExit, match="2"):
        main(["attribute", *arguments, f"--output_folder={tmp_path / 'out'}"])
    assert f"--number={number}: it must be 4" in capsys.readouterr().err


def test_a_trial_of_too_few_steps_is_left_out(
    encoder, audio, tmp_path, monkeypatch
):
    people = ("ann", "bob", "cat", "dan")
    lines = [f"1 {s}/0.wav {s}/{n}.wav" for s in people for n in (1, 2)]
    lines += [f"0 ann/{n}.wav {s}/1.wav" for s in people[1:] for n in (0, 2)]
    (tmp_path / "list").write_text("\n".join(lines) + "\n")
    explain, found = Explainer.__call__, []

    def second_fails(self, *wavs):
        found.append(found[0] if found else explain(self, *wavs))
        if len(found) == 2:
            raise ValueError("far off")
        return found[0]

    monkeypatch.setattr(Explainer, "__call__", second_fails)
    out = tmp_path / "out"
    options = {"number": 10, "over": ("features",), "device": "cpu"}
    facts = attribute(encoder, tmp_path / "list", audio, out, **options)
    assert facts["trials"] == 9 and facts["targets"] == 4
    assert list(facts["left_out"].values()) == ["far off"]
    (names,) = facts["left_out"]
    page = (out / "index.html").read_text(encoding="utf-8")
    assert f"{names}: far off" in page and "could not be made" not in page


def test_a_bad_recording_is_found_before_the_first_trial(
    encoder, tmp_path, monkeypatch
):
    noise = 0.1 * np.random.default_rng(0).normal(size=16000)
    soundfile.write(tmp_path / "good.wav", noise, 16000)
    soundfile.write(tmp_path / "mute.wav", 0 * noise, 16000)
    trials = "1 good.wav good.wav\n0 good.wav mute.wav\n"
    (tmp_path / "few").write_text(trials)
    with pytest.raises(ValueError, match="1 targets and 1 non-targets of"):
        attribute(encoder, tmp_path / "few", tmp_path, tmp_path / "out")
    trials += "1 mute.wav good.wav\n0 mute.wav good.wav\n"
    (tmp_path / "list").write_text(trials)
    monkeypatch.setattr(Explainer, "__call__", lambda *_: pytest.fail("late"))
    with pytest.raises(ValueError, match=r"mute\.wav"):
        attribute(encoder, tmp_path / "list", tmp_path, tmp_path / "out")


def test_a_channel_of_a_call(encoder, audio, tmp_path):
    """The speaker there and not both mixed; a single channel as it is."""
    one, _ = soundfile.read(audio / "bob" / "1.wav", dtype="int16")
    other, _ = soundfile.read(audio / "ann" / "0.wav", dtype="int16")
    size = min(len(one), len(other))
    (tmp_path / "call").mkdir()
    (tmp_path / "alone").mkdir()
    call = np.c_[other[:size], one[:size]]
    soundfile.write(tmp_path / "call" / "b.wav", call, 16000)
    soundfile.write(tmp_path / "alone" / "b.wav", one[:size], 16000)
    for folder in ("call", "alone"):
        soundfile.write(tmp_path / folder / "a.wav", other, 16000)
    lines = "1 a.wav a.wav\n1 b.wav b.wav\n0 a.wav b.wav\n0 b.wav a.wav\n"
    (tmp_path / "list").write_text(lines)

    def score(folder, *options):
        out = tmp_path / f"{folder}{len(options)}"
        words = [str(encoder), str(tmp_path / "list"), str(tmp_path / folder)]
        words += [f"--output_folder={out}", "--over=features", *options]
        main(["attribute", *words, "--device=cpu"])
        facts = json.loads((out / "attribution.json").read_text())
        return facts["score"]["non-target"]

    assert score("call", "--channel=1") == score("alone") != score("call")
    with pytest.raises(SystemExit, match="2"):
        score("call", "--channel=2", "--seed=1")


def test_half_of_what_is_drawn_are_targets():
    labels = np.arange(40) < 4
    rows = draw(labels, 10, seed=1)
    assert labels[rows].sum() == 4 and (~labels[rows]).sum() == 5
    assert len(set(rows)) == len(rows)
    assert np.array_equal(rows, draw(labels, 10, seed=1))
