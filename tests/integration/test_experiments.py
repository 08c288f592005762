"""Runs that part from another: what they keep of it, and their threads."""

import argparse
import sys

import experiments  # of the recipe's folder
import pytest
from tiny import RECIPE


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """Makes an experiment whose runs are not trained; what each began with."""
    found = {}
    done = {"done": {"stage1": {}, "ssps": {}}}

    def fork(parent, folder, keep):
        found["kept"] = [*keep]

    def run_command(command, printed, threads):
        found["threads"] = threads

    monkeypatch.setattr(experiments, "read_state", lambda folder: done)
    monkeypatch.setattr(experiments, "fork", fork)
    monkeypatch.setattr(experiments, "run_command", run_command)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yamls = [tmp_path / "stage1.yaml", tmp_path / "stage2.yaml"]
    for yaml in yamls:
        yaml.write_text("seed: 1", "utf-8")

    def begin(keep=("stage1",), **options):
        run = experiments.Experiment("x.py", yamls, tmp_path, [1], **options)
        (tmp_path / "seed1" / "other").mkdir(parents=True)
        run.train_one(1, experiments.Variant("other", keep=keep))
        return found

    return begin


@pytest.mark.parametrize(
    "keep, kept", [((), []), (("stage1",), ["stage1", "ssps"])]
)
def test_stage_1_is_kept_to_its_end_or_not_at_all(begun, keep, kept):
    assert begun(keep)["kept"] == kept


def test_a_setting_goes_to_its_stage_though_no_yaml_has_it(tmp_path):
    yamls = [tmp_path / "stage1.yaml", tmp_path / "stage2.yaml"]
    for yaml, own in zip(yamls, ("width", "depth")):
        yaml.write_text(f"seed: 1\n{own}: 2", "utf-8")
    options = ["--new_first_encoder=x", "--width=3", "--depth=3", "--debug"]
    run = experiments.Experiment("x.py", yamls, tmp_path, [1], options=options)
    assert run.options == [options[1::2], [options[0], *options[2:]]]


@pytest.mark.parametrize("option", sorted(experiments.OWN))
def test_what_each_run_gets_of_its_own_is_refused_at_once(tmp_path, option):
    yamls = [tmp_path / "stage1.yaml", tmp_path / "stage2.yaml"]
    for yaml in yamls:
        yaml.write_text(f"{option}: 1", "utf-8")
    given = [f"--{option}=2"]
    with pytest.raises(
        ValueError, match=f"--{option}=2: each run gets its own"
    ):
        experiments.Experiment("x.py", yamls, tmp_path, [1], options=given)


def test_a_device_is_that_of_all_work(tmp_path):
    """Of encoders that are embedded after the runs, too."""
    yamls = [tmp_path / "stage1.yaml", tmp_path / "stage2.yaml"]
    for yaml in yamls:
        yaml.write_text("seed: 1", "utf-8")
    words = ["--device=meta", "--debug"]
    run = experiments.Experiment("x.py", yamls, tmp_path, [1], options=words)
    assert run.device == "meta"


@pytest.mark.parametrize("nproc", [1, 2])
def test_threads_of_several_processes_are_torchruns(begun, monkeypatch, nproc):
    """More, in each of them, would be more threads than cores."""
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    wanted = 4 if nproc == 1 else None
    assert begun(jobs=2, nproc=nproc)["threads"] == wanted


@pytest.mark.parametrize("threads, told", [(None, "None"), (3, "3")])
def test_a_command_gets_the_threads(tmp_path, monkeypatch, threads, told):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code = "import os; print(os.environ.get('OMP_NUM_THREADS'))"
    printed = tmp_path / "printed.txt"
    experiments.run_command([sys.executable, "-c", code], printed, threads)
    assert printed.read_text().strip() == told


@pytest.mark.parametrize(
    "option, problem",
    [
        ("--classifier_epochs=0", "classifier_epochs: 0 should be"),
        ("--lr=-1", "lr: -1 should be"),
    ],
)
def test_settings_of_all_runs_are_tried_before_the_first(
    tmp_path, monkeypatch, option, problem
):
    """Also those of Stage II and of a variant, and not once Stage I is done."""
    monkeypatch.setattr(experiments.Experiment, "train_one", pytest.fail)
    yamls = [RECIPE / f"hparams/small_stage{stage}.yaml" for stage in (1, 2)]
    common = ["--data_folder=x"]
    for of_all, of_one in (([option], ()), ([], (option,))):
        experiment = experiments.Experiment(
            *("x.py", yamls, tmp_path, [1]), options=[*common, *of_all]
        )
        with pytest.raises(ValueError, match=problem):
            experiment.train([experiments.Variant("one", of_one)])


@pytest.mark.parametrize(
    "read, text, problem",
    [
        (experiments.whole_numbers, "1,a", "1,a: give whole numbers"),
        (experiments.count, "0", "0: give 1 or more"),
        (experiments.count, "a", "a: give 1 or more"),
    ],
)
def test_numbers_that_are_none_are_refused_in_a_line(read, text, problem):
    with pytest.raises(argparse.ArgumentTypeError, match=problem):
        read(text)
    assert read("3") in (3, [3])
