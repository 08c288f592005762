"""The gallery's refusals, and its tables of runs that are made up."""

import json
import sys
import types

import gallery  # of the recipe's folder
import pytest
from tiny import RECIPE


def write(folder, entry, eers):
    """A run of a method as the gallery leaves it."""
    run = folder / "seed1" / entry.name
    run.mkdir(parents=True)
    records = []
    for epoch, eer in enumerate(eers, 1):
        figures = dict.fromkeys(gallery.LABEL_FREE, eer)
        record = {"stage": 1, "phase": "x", "epoch": epoch, "eer": eer}
        records.append({**figures, **record})
    records.append(
        {"stage": 1, "phase": "after x", "eer": eers[-1], "eer_backend": 1.0}
    )
    lines = [json.dumps(record) for record in records]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    facts = {"steps": 60, "seconds_per_step": 0.5, "most_bytes": 2**30}
    (run / "gallery.json").write_text(json.dumps(facts))


def test_tables(tmp_path):
    for number, entry in enumerate(gallery.METHODS):
        write(tmp_path, entry, [50 - n - number for n in range(6)])
    runs = gallery.read_runs(tmp_path, gallery.METHODS, [1])
    figures, courses, criteria = gallery.tables(runs, 128)
    line = "| SimCLR + AAT | 60 | 256.0 | 1.0 | 45.0 | 1.0 | 45.00 |"
    assert line in figures
    assert "| SimCLR | 49.0 | 48.0 | 47.0 | 46.0 | 45.0 | 44.0 |" in courses
    # Each figure is the error rate here: those to be high rank it upside down.
    assert "| pseudo-trials' EER | 1.00 |" in criteria
    assert "| silhouette | -1.00 |" in criteria
    runs = gallery.read_runs(tmp_path, gallery.METHODS[:2], [1])
    figures, courses = gallery.tables(runs, 128)
    assert line in figures and "MoCo" not in figures
    gallery.write_results(tmp_path, runs, 128, minutes=6.0)
    assert line in (tmp_path / "gallery.md").read_text()
    assert (tmp_path / "gallery.png").stat().st_size > 10_000


def run(monkeypatch, *options):
    yaml = str(RECIPE / "hparams" / "small_stage1.yaml")
    typed = ["gallery.py", yaml, "--data_folder=/audio", *options]
    monkeypatch.setattr(sys, "argv", typed)
    gallery.main()


@pytest.fixture
def trained(monkeypatch):
    """Runs with a trial list, none of which is trained; those asked for."""
    found = []

    def train(entry, command, folder, seed, minutes):
        found.append(entry)
        run = folder / f"seed{seed}" / entry.name
        run.mkdir(parents=True, exist_ok=True)
        (run / "gallery.json").touch()

    monkeypatch.setattr(gallery, "train", train)
    monkeypatch.setattr(gallery, "trials_of", lambda *given: None)
    monkeypatch.setattr(gallery, "read_runs", lambda *given: {})
    monkeypatch.setattr(gallery, "write_results", lambda *given: None)
    return found


@pytest.mark.parametrize(
    "option, problem",
    [
        ("--verification_file=null", "gallery: there is no trial list"),
        ("--verification_file=/absent.txt", "there is no file /absent.txt"),
        ("--batchsize=4", "'batchsize'; did you mean"),
        ("--lr=-1", "lr: -1 should be"),
        ("--seeds=1,a", "1,a: give whole numbers"),
        ("--jobs=0", "0: give 1 or more"),
        ("--minutes=0", "--minutes=0.0: it must be above 0"),
        ("--minutes=nan", "--minutes=nan: it must be above 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_there(
    monkeypatch, capsys, tmp_path, option, problem
):
    """A record would refuse the corrected command."""
    with pytest.raises(SystemExit):
        run(monkeypatch, f"--output_folder={tmp_path}", option)
    assert problem in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_yaml_that_is_not_there_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gallery.py", "absent.yaml"])
    with pytest.raises(SystemExit):
        gallery.main()
    assert "absent.yaml" in capsys.readouterr().err.splitlines()[-1]


def test_a_table_is_of_one_command(monkeypatch, capsys, tmp_path, trained):
    """A second call with others would show the first one's figures."""
    own = f"--output_folder={tmp_path}", "--verification_file=list.txt"
    for further in ((), ("--seeds=1,2",)):
        run(monkeypatch, *own, *further)
    assert len(trained) == 3 * len(gallery.METHODS)
    for other in ("--minutes=1", "--lr=0.1"):
        with pytest.raises(SystemExit):
            run(monkeypatch, *own, other)
        assert "a gallery of another yaml" in capsys.readouterr().err
    assert len(trained) == 3 * len(gallery.METHODS)


def test_a_command_whose_runs_failed_may_be_corrected(
    monkeypatch, capsys, tmp_path, trained
):
    own = f"--output_folder={tmp_path}", "--methods=moco"
    length = tmp_path / "seed1" / "moco" / "length.json"

    def fail(*given):
        length.parent.mkdir(parents=True)
        length.touch()
        raise RuntimeError("x failed")

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(gallery, "train", fail)
        run(monkeypatch, *own)
    assert "\nRuntimeError: x failed\n" in capsys.readouterr().err
    run(monkeypatch, *own, "--batch_size=8")
    assert len(trained) == 1 and not length.exists()


def test_methods_are_chosen_by_name(monkeypatch, capsys, tmp_path, trained):
    own = f"--output_folder={tmp_path}", "--verification_file=list.txt"
    run(monkeypatch, *own, "--methods=simclr-and-aat,moco")
    assert [entry.title for entry in trained] == ["SimCLR + AAT", "MoCo"]
    with pytest.raises(SystemExit):
        run(monkeypatch, *own, "--methods=simclr,mocco")
    assert "['mocco'] is none of simclr-and-aat" in capsys.readouterr().err


@pytest.mark.parametrize("option", sorted(gallery.OWN))
def test_what_the_gallery_sets_itself_is_refused_at_once(
    monkeypatch, capsys, tmp_path, option
):
    with pytest.raises(SystemExit):
        run(monkeypatch, f"--output_folder={tmp_path}", f"--{option}=1")
    assert (
        f"--{option}: the gallery sets that itself" in capsys.readouterr().err
    )
    assert not any(tmp_path.iterdir())


def test_a_trial_list_of_the_users_is_for_the_training_alone(monkeypatch):
    """Given twice to the pilot, it would be refused."""
    times = iter([10.0, 70.0])
    commands = []

    def run_command(command, printed, threads):
        commands.append(command)
        return types.SimpleNamespace(ru_utime=next(times), ru_stime=0.0)

    monkeypatch.setattr(gallery, "run_command", run_command)
    command = ["train_lgl.py", "--verification_file=mine.txt", "--lr=1"]
    assert gallery.seconds_per_step(command) == 1.0
    for words in commands:
        given = [w for w in words if w.startswith("--verification_file")]
        assert given == ["--verification_file=null"] and "--lr=1" in words


def test_an_option_in_two_words_is_one(monkeypatch, tmp_path, trained):
    """The pilot, which strips the trial list, would be given it twice."""
    run(monkeypatch, f"--output_folder={tmp_path}", "--verification_file", "x")
    asked = json.loads((tmp_path / gallery.ASKED).read_text())
    assert "--verification_file=x" in asked["options"]
