"""A run's folder: steps are done once, metrics survive a torn line."""

import json
import os
import pathlib

import pytest

from lgl_plugin.runs import run as runs
from lgl_plugin.runs.metrics_log import read_metrics
from lgl_plugin.runs.plain import plain_settings
from lgl_plugin.runs.provenance import record_start
from lgl_plugin.runs.run import (
    Run,
    fork,
    planned_steps,
    round_of,
    stage_of,
    step_of,
)
from lgl_plugin.runs.state import write_state
from lgl_plugin.utils.files import atomic_write, write_json

# The name tells whose step it is: those of Stage II lie in a round's folder.
LABELS, GATED = "iter1/labels", "iter1/gated"


def test_ssps_is_a_step_of_stage1_behind_the_method():
    settings = {"stage 1": {"ssps_epochs": 2}, "stage 2": {"n_iterations": 0}}
    ssps = ["ssps", "export/ssps"]
    simclr = ["baselines", "stage1", "export/stage1"]
    assert planned_steps(settings) == [*simclr, *ssps]
    settings["stage 1"]["ssps_epochs"] = 0
    assert planned_steps(settings) == simclr
    assert step_of({"stage": 1, "phase": "after ssps"}) == "ssps"
    assert step_of({"stage": 1, "phase": "simclr"}) == "stage1"


def test_records_of_neither_stage_are_of_the_baselines_or_the_ceiling():
    assert step_of({"stage": 0, "phase": "untrained"}) == "baselines"
    for phase in ("true labels", "after true labels"):
        assert step_of({"stage": 0, "phase": phase}) == "ceiling"


def test_a_step_tells_its_round_and_stage():
    rounds = {"iter2": 2, "iter12/gated": 12, "iter1/gated/average3": 1}
    assert {step: round_of(step) for step in rounds} == rounds
    assert {stage_of(step) for step in rounds} == {"stage 2"}
    for step in ("stage1", "ssps", "export/iter2", "", "iterations/1"):
        assert round_of(step) == 0 and stage_of(step) == "stage 1"
    assert round_of("ceiling") == 0 and stage_of("ceiling") == "stage 2"


@pytest.mark.parametrize("stage", [1, 2])
def test_a_ceiling_refuses_no_other_settings(tmp_path, stage):
    """It is done again by its source."""
    run = Run(tmp_path, 2, {"lr": 0.1})
    run.step("ceiling", lambda folder: {})
    Run(tmp_path, stage, {"lr": 0.1}).save()
    assert Run(tmp_path, stage, {"lr": 0.2}).settings[run.key]


def test_step_that_fails_is_not_done(tmp_path):
    run = Run(tmp_path, 1, {})

    def fail(folder):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run.step("stage1", fail)
    done = Run(tmp_path, 1, {}).step("stage1", lambda folder: {"n": 1})
    assert done == {"n": 1}


def test_each_step_says_where_it_is(tmp_path, caplog):
    """Of the stage's own steps; of both stages' once the second is known."""
    caplog.set_level("INFO")
    Run(tmp_path, 1, {"lr": 1}).step("stage1", lambda folder: None)
    assert caplog.messages[0] == "step 2 of 2: stage1"
    options = {"n_iterations": 2, "large_margin_epochs": 1}
    run = Run(tmp_path, 2, options)
    for name in ("iter1/embeddings", "iter2/large_margin", "export/iter2"):
        run.step(name, lambda folder: None)
    said = [line for line in caplog.messages if line.startswith("step ")]
    assert said[1:] == [
        "step 3 of 11: iter1/embeddings",
        "step 11 of 11: iter2/large_margin",
    ]
    assert "export/iter2 begins" in caplog.messages
    run.plan = ["mine"]  # a recipe may have others
    run.step("mine", lambda folder: None)
    assert "step 1 of 1: mine" in caplog.messages
    run.step("unplanned", lambda folder: None)
    assert "unplanned begins" in caplog.messages


def test_stage2_alone_has_four_or_five_steps_a_round_and_an_export():
    for margin, n_steps in ((0, 10), (1, 11)):
        settings = {"n_iterations": 2, "large_margin_epochs": margin}
        assert len(planned_steps({"stage 2": settings})) == n_steps


def test_stages_share_a_folder_with_settings_of_their_own(tmp_path):
    Run(tmp_path, 1, {"lr": 1}).step("stage1", lambda folder: None)
    Run(tmp_path, 2, {"lr": 2}).step("iter1/labels", lambda folder: None)
    assert set(Run(tmp_path, 1, {"lr": 1}).done) == {"stage1", "iter1/labels"}
    with pytest.raises(ValueError, match="lr: was 2, is 3"):
        Run(tmp_path, 2, {"lr": 3})


@pytest.mark.parametrize(("first", "second"), [(0, 1), (2, 0)])
def test_an_adaptation_and_a_training_share_no_folder(tmp_path, first, second):
    Run(tmp_path, first, {"a": 1}).step("start", lambda folder: {})
    with pytest.raises(ValueError, match="holds a.* name another folder"):
        Run(tmp_path, second, {"a": 1})


def test_torn_line_swallows_neither_itself_nor_the_next(tmp_path):
    run = Run(tmp_path, 1, {})
    run.log(stage=1, phase="simclr", epoch=1)
    with open(tmp_path / "metrics.jsonl", "a") as metrics:
        metrics.write('{"stage": 1, "pha')
    run.log(stage=1, phase="simclr", epoch=2)
    assert [r["epoch"] for r in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_logged_as_null(tmp_path, value):
    Run(tmp_path, 1, {}).log(stage=2, phase="gated", tau=value)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["tau"] is None


def test_fork_takes_over_steps_and_what_they_logged(tmp_path):
    run = Run(tmp_path / "run", 2, {"gate": "fixed"})
    for phase in ("labels", "classifier", "gated"):
        run.step(f"iter1/{phase}", lambda folder: (folder / "w").touch())
    (run.folder / "manifest.csv").write_text("ID")
    for phase in ("clusters", "classifier", "after classifier", "gated"):
        run.log(stage=2, iteration=1, phase=phase, loss=1.0)
    kept = ["iter1/labels", "iter1/classifier"]
    fork(run.folder, tmp_path / "new", kept)
    new = Run(tmp_path / "new", 2, {"gate": "none"})
    assert list(new.done) == kept
    assert (new.folder / "manifest.csv").read_text() == "ID"
    assert (new.folder / "iter1/classifier/w").exists()
    assert not (new.folder / "iter1/gated").exists()
    logged = (new.folder / "metrics.jsonl").read_text().splitlines()
    phases = [json.loads(line)["phase"] for line in logged]
    assert phases == ["clusters", "classifier", "after classifier"]
    # Again: the new run's own work stays.
    new.step("iter1/gated", lambda folder: {})
    fork(run.folder, tmp_path / "new", kept)
    assert "iter1/gated" in Run(tmp_path / "new", 2, {"gate": "none"}).done


def test_fork_of_what_is_not_done_yet(tmp_path):
    run = Run(tmp_path / "run", 1, {})
    run.step("stage1", lambda folder: {})
    with pytest.raises(ValueError, match="iter1/labels"):
        fork(run.folder, tmp_path / "new", ["stage1", "iter1/labels"])


def test_settings_that_are_no_numbers_of_json_are_kept(tmp_path):
    settings = plain_settings("gate: !new:a.Gate {tau: .inf, scale: 0.5}")
    for _ in range(2):
        Run(tmp_path, 2, settings).step(LABELS, lambda folder: {})


def chain(run, calls, seed=0):
    """Two steps, the second made from the first, and what they leave."""

    def labels(folder):
        calls.append(LABELS)
        write_json(folder / "labels.json", list(range(seed, 99)))
        return {"n": 1}

    def gated(folder):
        calls.append(GATED)
        seen = json.loads((run.folder / LABELS / "labels.json").read_text())
        write_json(folder / "weights.json", sum(seen))

    run.step(LABELS, labels)
    run.step(GATED, gated, run.checksum(LABELS))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, flip, pathlib.Path.unlink])
@pytest.mark.parametrize(
    "step, name", [(LABELS, "labels.json"), (GATED, "weights.json")]
)
def test_a_damaged_step_alone_is_done_again(tmp_path, caplog, harm, step, name):
    """If it comes out as it was, what was made from it still holds."""
    chain(Run(tmp_path, 2, {}), [])
    before = (tmp_path / step / name).read_bytes()
    state = (tmp_path / "state.json").read_bytes()
    harm(tmp_path / step / name)
    calls = []
    chain(Run(tmp_path, 2, {}), calls)
    assert calls == [step]
    assert (tmp_path / step / name).read_bytes() == before
    assert f"{step} is done again: {name}" in caplog.text
    after = json.loads((tmp_path / "state.json").read_text())
    assert after["files"] == json.loads(state)["files"]
    calls.clear()
    chain(Run(tmp_path, 2, {}), calls)
    assert calls == []


def test_a_step_that_came_out_otherwise_takes_its_followers_along(tmp_path):
    """Their checkpoints, trained on what is no more, go too."""
    chain(Run(tmp_path, 2, {}), [])
    for step in (LABELS, GATED):
        (tmp_path / step / "checkpoints").mkdir()
    truncate(tmp_path / LABELS / "labels.json")
    calls = []
    chain(Run(tmp_path, 2, {}), calls, seed=1)
    assert calls == [LABELS, GATED]
    made = json.loads((tmp_path / f"{GATED}/weights.json").read_text())
    assert made == sum(range(1, 99))
    assert (tmp_path / LABELS / "checkpoints").exists()
    assert not (tmp_path / GATED / "checkpoints").exists()


def test_a_kill_between_a_step_and_its_followers_is_made_good(tmp_path):
    chain(Run(tmp_path, 2, {}), [])
    truncate(tmp_path / LABELS / "labels.json")
    run = Run(tmp_path, 2, {})

    def killed(folder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.step(LABELS, killed)
    assert list(Run(tmp_path, 2, {}).done) == [GATED]
    calls = []
    chain(Run(tmp_path, 2, {}), calls, seed=1)
    assert calls == [LABELS, GATED]


def test_what_a_kill_left_half_written_is_swept_away(tmp_path):
    (tmp_path / LABELS).mkdir(parents=True)
    left = tmp_path / LABELS / ".labels.json.x7.part"
    left.write_text("[1, 2")
    chain(Run(tmp_path, 2, {}), [])
    assert not left.exists()


def test_what_a_step_removes_again_is_not_on_record(tmp_path):
    """As extraction does with what it keeps on its way."""

    def work(folder):
        for name in (".share0.npz", "vectors.json"):
            write_json(folder / name, 1)
        (folder / ".share0.npz").unlink()

    run = Run(tmp_path, 2, {})
    run.step("iter1/embeddings", work)
    assert list(run.files["iter1/embeddings"]) == ["vectors.json"]


def test_what_people_may_edit_is_theirs(tmp_path):
    """SpeechBrain's log in a step's folder, the model card, a note."""

    def work(folder):
        for name in ("README.md", "encoder.json"):
            write_json(folder / name, 1)
        (folder / "log.txt").write_text("begun")

    Run(tmp_path, 2, {}).step("stage1", work)
    for name in ("README.md", "log.txt", "note.txt"):
        (tmp_path / "stage1" / name).write_text("mine")
    run = Run(tmp_path, 2, {})
    run.step("stage1", lambda folder: pytest.fail("done again"))
    assert list(run.files["stage1"]) == ["encoder.json"]


def test_a_failed_step_is_tried_again(tmp_path):
    run = Run(tmp_path, 2, {})
    run.step("export/stage1", lambda folder: {"failed": "no audio"})
    run = Run(tmp_path, 2, {})
    assert not run.done and run.failed == {"export/stage1": "no audio"}
    run.step("export/stage1", lambda folder: {"threshold": 0.5})
    run = Run(tmp_path, 2, {})
    assert run.done == {"export/stage1": {"threshold": 0.5}}
    assert not run.failed


@pytest.mark.parametrize(
    "harm",
    [
        truncate,
        flip,
        lambda path: path.write_text('{"of": "something else"}'),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text(path.read_text().replace(": 1", ": 2")),
    ],
)
def test_a_damaged_state_is_named(tmp_path, harm):
    chain(Run(tmp_path, 2, {}), [])
    harm(tmp_path / "state.json")
    with pytest.raises(ValueError, match="state.json is damaged"):
        Run(tmp_path, 2, {})


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"done": {}}', '{"done": [], "settings": {}}', "[" * 9999]
    + ['{"done": {"../x": {}}, "settings": {}}', '"\udce9"'],
)
def test_damaged_state_is_named(tmp_path, text):
    path = tmp_path / "state.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="state.json is damaged"):
        Run(tmp_path, 2, {})


def test_a_state_changed_on_purpose(tmp_path):
    """Without its checksum it is taken as it is."""
    chain(Run(tmp_path, 2, {}), [])
    state = json.loads((tmp_path / "state.json").read_text())
    del state["checksum"], state["done"][GATED]
    (tmp_path / "state.json").write_text(json.dumps(state))
    calls = []
    chain(Run(tmp_path, 2, {}), calls)
    assert calls == [GATED]


def test_metrics_without_a_state_belong_to_another_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="metrics of a run but no state.json"):
        Run(tmp_path, 2, {})
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"


def kill_in(run, step, checkpoint):
    """Begins a step, which is killed after or before its first checkpoint."""

    def killed(folder):
        if checkpoint:
            (folder / "checkpoints" / "CKPT+1").mkdir(parents=True)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.step(step, killed)


@pytest.fixture
def stage1_of(tmp_path, monkeypatch):
    """Starts Stage I in so many processes, with such batches in each."""

    def start(processes, batch_size, **more):
        monkeypatch.setattr(runs, "world_size", lambda: processes)
        loader = {"batch_size": batch_size, "num_workers": 0}
        settings = {"batch_size": batch_size, "dataloader_options": loader}
        settings["lr"] = 1
        return Run(tmp_path, 1, {**settings, **more})

    return start


def test_other_processes_keep_the_batch_of_all(stage1_of, caplog):
    """Four GPUs, then two: a run went on in batches of half the size."""
    kill_in(stage1_of(4, 96), "stage1", checkpoint=True)
    caplog.clear()
    stage1_of(2, 192).save()
    stage1_of(1, 384).save()
    assert not caplog.messages
    with pytest.raises(ValueError, match="\nlr: was 1, is 2$"):
        stage1_of(4, 96, lr=2)
    with pytest.raises(ValueError, match="\nbatch_size: was 96, is 192$"):
        stage1_of(1, 192)
    assert not caplog.messages


def test_other_processes_with_the_same_batch_size_are_a_warning(
    stage1_of, caplog
):
    """The advice stays right after runs that did not heed it."""
    kill_in(stage1_of(4, 96), "stage1", checkpoint=True)
    caplog.clear()
    for processes, advice in (
        (2, "--batch_size=192 makes that batch"),
        (2, "--batch_size=192 makes that batch"),
        (5, "5 processes cannot make that batch"),
    ):
        stage1_of(processes, 96).save()
        said = f"was begun with a batch of 384 in all: {advice}."
        (message,) = caplog.messages
        assert message.endswith(said)
        caplog.clear()
    stage1_of(2, 192)
    assert not caplog.messages


def test_a_stage_that_is_not_begun_takes_any_batch(stage1_of, caplog):
    stage1_of(4, 96).save()
    kill_in(stage1_of(2, 96), "stage1", checkpoint=True)
    caplog.clear()
    stage1_of(1, 192)
    assert not caplog.messages


def test_another_number_of_processes_does_no_step_again(stage1_of):
    """Steps such as `ceiling` are made by the identity of the settings."""
    run = stage1_of(2, 64)
    before = run.identity()
    kill_in(run, "stage1", checkpoint=True)
    assert stage1_of(1, 128).identity() == before


def test_a_run_of_an_earlier_version_keeps_its_batch_size(
    stage1_of, tmp_path, caplog
):
    """Its state.json has no batches, and any batch_size would be taken."""
    kill_in(stage1_of(1, 64), "stage1", checkpoint=True)
    state = json.loads((tmp_path / "state.json").read_text())
    del state["batches"], state["checksum"]
    caplog.clear()
    for processes in (1, 2):
        write_state(tmp_path, state)
        with pytest.raises(ValueError, match="batch_size: was 64, is 32"):
            stage1_of(processes, 32)
    stage1_of(2, 64)
    assert not caplog.messages


def test_a_begun_ceiling_keeps_the_batch_of_all(tmp_path, monkeypatch, caplog):
    """The ceiling counts as no step, and other settings do it again."""

    def start(processes, batch_size):
        monkeypatch.setattr(runs, "world_size", lambda: processes)
        return Run(tmp_path, 2, {"batch_size": batch_size})

    run = start(2, 64)
    before = run.identity()
    kill_in(run, "ceiling", checkpoint=True)
    caplog.clear()
    run = start(1, 128)
    assert run.identity() == before and not caplog.messages
    run = start(1, 64)
    assert run.identity() == before
    assert "--batch_size=128 makes that batch" in caplog.messages[-1]
    caplog.clear()
    assert start(1, 32).identity() != before and not caplog.messages


@pytest.mark.parametrize("name", ["batch_size", "lr"])
def test_a_begun_run_keeps_its_batch_and_learning_rate(name, tmp_path):
    before = {"batch_size": 64, "lr": 0.1}
    kill_in(Run(tmp_path, 1, before), "stage1", checkpoint=True)
    with pytest.raises(ValueError, match=f"{name}: was"):
        Run(tmp_path, 1, {**before, name: 2})


def test_settings_are_on_record_before_the_first_step_ends(tmp_path):
    """A kill in the first step must not let others go on with its work."""
    kill_in(Run(tmp_path, 1, {"lr": 1}), "stage1", checkpoint=True)
    with pytest.raises(ValueError, match=r"\(stage1\)(.|\n)*lr: was 1, is 2"):
        Run(tmp_path, 1, {"lr": 2})
    Run(tmp_path, 1, {"lr": 1})


def test_a_mistyped_setting_spoils_no_folder(tmp_path):
    """Without a checkpoint nothing was made with it."""
    run = Run(tmp_path, 1, {"lr": -1, "n_mels": 40})
    run.step("baselines", lambda folder: {"n_mels": 40}, run.identity())
    kill_in(run, "stage1", checkpoint=False)
    run = Run(tmp_path, 1, {"lr": 1, "n_mels": 80})
    # Baselines are quick, and n_mels changes them.
    work = {"n_mels": 80}
    again = run.step("baselines", lambda folder: work, run.identity())
    assert again == {"n_mels": 80}
    run.step("stage1", lambda folder: {})
    with pytest.raises(ValueError, match="n_mels: was 80, is 40"):
        Run(tmp_path, 1, {"lr": 1, "n_mels": 40})


def test_checkpoints_of_a_debug_run_are_no_steps(tmp_path):
    debug = Run(tmp_path / "debug", 1, {"lr": 2})
    kill_in(debug, "stage1", checkpoint=True)
    run = Run(tmp_path, 1, {"lr": 1})
    run.step("baselines", lambda folder: {})
    Run(tmp_path, 1, {"lr": 2})


PLACES = {
    "data_folder": "/old/corpus",
    "train_folder": "/old/corpus/wav",
    "dataloader_options": {"batch_size": 8, "num_workers": 8},
    "ckpt_interval_minutes": 10,
    "lr": 0.1,
}


@pytest.mark.parametrize(
    "change",
    [
        {"dataloader_options": {"batch_size": 8, "num_workers": 0}},
        {"ckpt_interval_minutes": 0},
        {"data_folder": "/new/place", "train_folder": "/new/place/wav"},
        {"data_folder": "corpus", "train_folder": "corpus/wav"},
        {"data_folder": "/old/corpus/", "train_folder": "/old/corpus//wav"},
    ],
)
@pytest.mark.parametrize("stage, step", [(1, "stage1"), (2, LABELS)])
def test_what_leaves_the_result_as_it_is_may_change(
    tmp_path, stage, step, change
):
    """More loader processes, rarer checkpoints, data that were moved."""
    Run(tmp_path, stage, PLACES).step(step, lambda folder: {"n": 1})
    again = Run(tmp_path, stage, {**PLACES, **change})
    done = again.step(step, lambda folder: pytest.fail("done again"))
    assert done == {"n": 1}
    # The record follows, and what counts is refused as before.
    state = json.loads((tmp_path / "state.json").read_text())
    assert state["settings"][f"stage {stage}"] == PLACES
    again.save()
    state = json.loads((tmp_path / "state.json").read_text())
    assert state["settings"][f"stage {stage}"] == {**PLACES, **change}
    with pytest.raises(ValueError) as error:
        Run(tmp_path, stage, {**PLACES, **change, "lr": 0.2})
    assert str(error.value).splitlines()[1:] == ["lr: was 0.1, is 0.2"]


def settings_of(n_clusters):
    """As plain settings are: two objects refer to a number."""
    return plain_settings(
        f"n_clusters: {n_clusters}\n"
        f"cluster: !new:a.KMeans {{n_clusters: {n_clusters}}}\n"
        f"gate: !new:a.Gate {{classes: {n_clusters}}}\n"
    )


@pytest.mark.parametrize("last, epochs", [("stage1", 0), ("ssps", 10)])
def test_another_n_clusters_costs_no_stage1(tmp_path, last, epochs):
    """It is refused where Stage II has steps, and only there."""
    first = {"lr": 1, "ssps_epochs": epochs}
    Run(tmp_path, 1, first).step("stage1", lambda folder: {"epochs": 3})
    # Stage II begins, but makes nothing.
    kill_in(Run(tmp_path, 2, settings_of(5)), LABELS, checkpoint=False)
    Run(tmp_path, 2, settings_of(6)).step(LABELS, lambda folder: {})
    with pytest.raises(ValueError) as error:
        Run(tmp_path, 2, settings_of(7))
    said = str(error.value)
    assert said.splitlines()[1:] == ["n_clusters: was 6, is 7"]
    assert f"holds steps of stage 2 with other settings ({LABELS})" in said
    # The encoder that Stage II began with, after the positives.
    assert f"--pretrained_encoder={tmp_path}/{last}, and Stage I need" in said
    assert "delet" not in said and "remov" not in said
    # Stage I is as it was, and the run goes on with its own settings.
    for stage, settings in ((1, first), (2, settings_of(6))):
        run = Run(tmp_path, stage, settings)
        assert set(run.done) == {"stage1", LABELS}
    done = Run(tmp_path, 1, first).step("stage1", pytest.fail)
    assert done == {"epochs": 3}


def test_more_rounds_go_on_in_the_folder_of_the_first(tmp_path):
    """But fewer do not, nor with another setting besides."""
    one, two = ({"n_iterations": n, "large_margin_epochs": 0} for n in (1, 2))
    Run(tmp_path, 2, one).step(LABELS, lambda folder: {"k": 5})
    with pytest.raises(ValueError, match="n_iterations: was 1, is 2\nlr"):
        Run(tmp_path, 2, {**two, "lr": 1})
    run = Run(tmp_path, 2, two)
    assert run.step(LABELS, pytest.fail) == {"k": 5}
    run.step("iter2/embeddings", lambda folder: {})
    with pytest.raises(ValueError, match="n_iterations: was 2, is 1"):
        Run(tmp_path, 2, one)


@pytest.mark.parametrize(
    "last", [{"large_margin_epochs": 3}, {"new_last_encoder": {"!name:a": ""}}]
)
def test_a_last_round_of_another_kind_stays_the_last(tmp_path, last):
    Run(tmp_path, 2, {"n_iterations": 1, **last}).step(LABELS, lambda _: {})
    with pytest.raises(ValueError, match="n_iterations: was 1, is 2"):
        Run(tmp_path, 2, {"n_iterations": 2, **last})


def test_another_setting_of_stage1_is_refused_without_a_word_of_deletion(
    tmp_path,
):
    Run(tmp_path, 1, {"lr": 1}).step("stage1", lambda folder: {})
    with pytest.raises(ValueError) as error:
        Run(tmp_path, 1, {"lr": 2})
    assert str(error.value) == (
        f"{tmp_path} holds steps of stage 1 with other settings (stage1). Go "
        "on with those, or set another --output_folder.\nlr: was 1, is 2"
    )


def test_a_stage_that_only_exported_may_change(tmp_path):
    """An export is made anew from what it is made from."""
    run = Run(tmp_path, 1, {"lr": 1})
    run.step("export/stage1", lambda folder: {})
    Run(tmp_path, 1, {"lr": 2})


def test_another_file_under_a_settings_name_is_refused(tmp_path):
    """What it contains counts, and where it lies does not."""
    first, moved, other = (tmp_path / name for name in ("a", "b", "c"))
    for path, text in ((first, "1 x y"), (moved, "1 x y"), (other, "0 x z")):
        path.write_text(text)
    run = Run(tmp_path / "run", 1, {"lr": 1})
    run.record_input("verification_file", first)
    run.step("stage1", lambda folder: {})
    run = Run(tmp_path / "run", 1, {"lr": 1})
    run.record_input("verification_file", moved)
    with pytest.raises(ValueError, match=f"^verification_file: {other} is not"):
        run.record_input("verification_file", other)
    # Stage II has a record of its own.
    Run(tmp_path / "run", 2, {}).record_input("verification_file", other)


def test_noise_that_changed_is_refused(tmp_path):
    run = Run(tmp_path / "run", 1, {"rir_folder": "a"})
    run.record_input("rir_folder", "a", lambda path: "noise")
    run.step("baselines", lambda folder: {"n": 1}, run.identity())
    run = Run(tmp_path / "run", 1, {"rir_folder": "b"})
    run.record_input("rir_folder", "b", lambda path: "noise")  # moved
    assert run.step("baselines", pytest.fail, run.identity()) == {"n": 1}
    with pytest.raises(ValueError, match="^rir_folder: b is not what it was"):
        run.record_input("rir_folder", "b", lambda path: "more noise")


def test_altered_metrics_are_reported(tmp_path, caplog):
    run = Run(tmp_path, 2, {})
    run.log(stage=1, phase="simclr", epoch=1, loss=1.0)
    run.step("stage1", lambda folder: {})
    run.log(stage=1, phase="after simclr", epoch=2, loss=1.0)
    path = tmp_path / "metrics.jsonl"
    truncate(path)
    Run(tmp_path, 2, {})  # only the step under way has lost a line
    assert "altered" not in caplog.text
    path.write_text(path.read_text().replace("simclr", "gated", 1))
    Run(tmp_path, 2, {})
    assert "metrics.jsonl has been altered" in caplog.text


def test_records_of_a_step_done_again_take_the_place_of_the_old(tmp_path):
    run = Run(tmp_path, 2, {})
    for loss in (2.0, 1.0):
        for epoch in (1, 2):
            run.log(stage=1, phase="simclr", epoch=epoch, loss=loss)
        run.log(stage=1, phase="after simclr", eer=loss)
        if loss == 2.0:
            run.log(stage=2, iteration=1, phase="clusters")
    found = [
        (r["phase"], r.get("epoch"), r.get("loss", r.get("eer")))
        for r in read_metrics(tmp_path)
    ]
    assert found == [
        ("simclr", 1, 1.0),
        ("simclr", 2, 1.0),
        ("after simclr", None, 1.0),
        ("clusters", None, None),
    ]


def test_a_fork_knows_what_it_took_over(tmp_path):
    run = Run(tmp_path / "run", 2, {})
    chain(run, [])
    fork(run.folder, tmp_path / "new", [LABELS])
    truncate(tmp_path / "new" / LABELS / "labels.json")
    calls = []
    chain(Run(tmp_path / "new", 2, {"gate": "none"}), calls)
    assert calls == [LABELS, GATED]


def test_checkpoints_behind_a_link_go_with_their_source(tmp_path):
    """A folder on another disk: what was trained on other data lies there."""
    run = Run(tmp_path / "run", 1, {})
    elsewhere = tmp_path / "big_disk"
    elsewhere.mkdir()
    run.step("stage1", lambda folder: None, source="one")
    (run.folder / "stage1" / "checkpoints").symlink_to(elsewhere)
    (elsewhere / "CKPT+old").mkdir()
    seen = []
    run.step(
        "stage1",
        lambda folder: seen.extend((folder / "checkpoints").iterdir()),
        source="other",
    )
    assert not seen and elsewhere.is_dir()
    assert (run.folder / "stage1" / "checkpoints").is_symlink()


@pytest.mark.parametrize("name", ["metrics.jsonl", "starts.jsonl"])
def test_lines_are_synced_before_a_step_counts_as_done(
    name, tmp_path, monkeypatch
):
    """A power cut must not take figures of steps that state.json calls done."""
    synced = []
    fsync = os.fsync

    def spy(handle):
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", spy)
    run = Run(tmp_path, 2, {})
    if name == "starts.jsonl":
        record_start(run.folder, 1, "cpu")
    else:
        run.log(stage=1, phase="simclr", epoch=1)
    assert name in synced


def test_other_inputs_are_taken_while_nothing_is_made_of_them(tmp_path):
    """A mistyped data_folder must not spoil the folder either."""
    audio = tmp_path / "manifest.csv"
    run = Run(tmp_path / "run", 1, {})
    for content, made in (("wrong", 1), ("right", 2), ("right", 2)):
        audio.write_text(content)
        run = Run(tmp_path / "run", 1, {})
        run.record_input("manifest", audio)
        n = run.step(
            "baselines", lambda folder, n=made: {"n": n}, run.identity()
        )
        assert n == {"n": made}  # done again for other audio only
    run.step("stage1", lambda folder: {})
    audio.write_text("wrong")
    with pytest.raises(ValueError, match="is not what it was when stage 1"):
        Run(tmp_path / "run", 1, {}).record_input("manifest", audio)


def test_a_step_made_of_another_source_leaves_nothing_of_the_old_one(tmp_path):
    """Fine-tuning that now has too few utterances leaves no encoder."""

    def fine_tune(folder):
        with atomic_write(folder / "encoder.ckpt") as out:
            out.write("old")

    run = Run(tmp_path, 2, {})
    run.step("iter1/large_margin", fine_tune, source="one")
    encoder = tmp_path / "iter1/large_margin/encoder.ckpt"
    assert encoder.exists()
    run.step("iter1/large_margin", lambda folder: None, source="other")
    assert not encoder.exists()
