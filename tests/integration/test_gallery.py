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


def test_without_a_trial_list_nothing_is_trained(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--verification_file=null")
    assert "a gallery needs a trial list" in capsys.readouterr().err


def test_a_table_is_of_one_command(monkeypatch, capsys, tmp_path):
    """A second call with others would show the first one's figures."""
    trained = []
    monkeypatch.setattr(gallery, "train", lambda *given: trained.append(given))
    monkeypatch.setattr(gallery, "read_runs", lambda *given: {})
    monkeypatch.setattr(gallery, "write_results", lambda *given: None)
    own = f"--output_folder={tmp_path}", "--verification_file=list.txt"
    for further in ((), ("--seeds=1,2",)):
        run(monkeypatch, *own, *further)
    assert len(trained) == 3 * len(gallery.METHODS)
    for other in ("--minutes=1", "--lr=0.1"):
        with pytest.raises(SystemExit):
            run(monkeypatch, *own, other)
        assert "a gallery of another yaml" in capsys.readouterr().err
    assert len(trained) == 3 * len(gallery.METHODS)


def test_methods_are_chosen_by_name(monkeypatch, capsys, tmp_path):
    trained = []
    monkeypatch.setattr(gallery, "train", lambda *given: trained.append(given))
    monkeypatch.setattr(gallery, "read_runs", lambda *given: {})
    monkeypatch.setattr(gallery, "write_results", lambda *given: None)
    own = f"--output_folder={tmp_path}", "--verification_file=list.txt"
    run(monkeypatch, *own, "--methods=simclr-and-aat,moco")
    assert [given[0].title for given in trained] == ["SimCLR + AAT", "MoCo"]
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


def test_a_mistyped_option_is_refused_at_once(monkeypatch):
    with pytest.raises(ValueError, match="'batchsize'; did you mean"):
        run(monkeypatch, "--batchsize=4")
