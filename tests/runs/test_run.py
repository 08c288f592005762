"""A run's folder: steps are done once, metrics survive a torn line."""

import json
import pathlib

import pytest

from lgl_plugin.runs.metrics_log import read_metrics
from lgl_plugin.runs.run import Run, fork
from lgl_plugin.runs.settings import plain_settings
from lgl_plugin.utils.files import write_json


def test_step_that_fails_is_not_done(tmp_path):
    run = Run(tmp_path, 1, {})

    def fail(folder):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run.step("stage1", fail)
    done = Run(tmp_path, 1, {}).step("stage1", lambda folder: {"n": 1})
    assert done == {"n": 1}


def test_stages_share_a_folder_with_settings_of_their_own(tmp_path):
    Run(tmp_path, 1, {"lr": 1}).step("stage1", lambda folder: None)
    Run(tmp_path, 2, {"lr": 2}).step("iter1/labels", lambda folder: None)
    assert set(Run(tmp_path, 1, {"lr": 1}).done) == {"stage1", "iter1/labels"}
    with pytest.raises(ValueError, match="lr: was 2, is 3"):
        Run(tmp_path, 2, {"lr": 3})


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


def test_settings_know_tags_but_no_comments_and_no_folder():
    first = "gate: !new:a.Fixed\n    tau: 1  # why\noutput_folder: x\n"
    second = "output_folder: y\ngate: !new:a.Fixed {tau: 1}\n"
    other = "output_folder: y\ngate: !new:a.Other {tau: 1}\n"
    assert plain_settings(first) == plain_settings(second)
    assert plain_settings(first) != plain_settings(other)
    # Who bears more bad files may go on.
    assert plain_settings(first + "max_bad_share: 1") == plain_settings(first)


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
    assert settings == {"gate": {"!new:a.Gate": {"tau": ".inf", "scale": 0.5}}}
    for _ in range(2):
        Run(tmp_path, 2, settings).step("first", lambda folder: {})


def chain(run, calls, seed=0):
    """Two steps, the second made from the first, and what they leave."""

    def first(folder):
        calls.append("first")
        write_json(folder / "labels.json", list(range(seed, 99)))
        return {"n": 1}

    def second(folder):
        calls.append("second")
        seen = json.loads((run.folder / "first/labels.json").read_text())
        write_json(folder / "weights.json", sum(seen))

    run.step("first", first)
    run.step("second", second, run.checksum("first"))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, flip, pathlib.Path.unlink])
@pytest.mark.parametrize(
    "step, name", [("first", "labels.json"), ("second", "weights.json")]
)
def test_a_damaged_step_alone_is_done_again(tmp_path, caplog, harm, step, name):
    """If it comes out as it was, what was made from it still holds."""
    chain(Run(tmp_path, 1, {}), [])
    before = (tmp_path / step / name).read_bytes()
    state = (tmp_path / "state.json").read_bytes()
    harm(tmp_path / step / name)
    calls = []
    chain(Run(tmp_path, 1, {}), calls)
    assert calls == [step]
    assert (tmp_path / step / name).read_bytes() == before
    assert f"{step} is done again: {name}" in caplog.text
    after = json.loads((tmp_path / "state.json").read_text())
    assert after["files"] == json.loads(state)["files"]
    calls.clear()
    chain(Run(tmp_path, 1, {}), calls)
    assert calls == []


def test_a_step_that_came_out_otherwise_takes_its_followers_along(tmp_path):
    """Their checkpoints, trained on what is no more, go too."""
    chain(Run(tmp_path, 1, {}), [])
    for step in ("first", "second"):
        (tmp_path / step / "checkpoints").mkdir()
    truncate(tmp_path / "first" / "labels.json")
    calls = []
    chain(Run(tmp_path, 1, {}), calls, seed=1)
    assert calls == ["first", "second"]
    made = json.loads((tmp_path / "second/weights.json").read_text())
    assert made == sum(range(1, 99))
    assert (tmp_path / "first" / "checkpoints").exists()
    assert not (tmp_path / "second" / "checkpoints").exists()


def test_a_kill_between_a_step_and_its_followers_is_made_good(tmp_path):
    chain(Run(tmp_path, 1, {}), [])
    truncate(tmp_path / "first" / "labels.json")
    run = Run(tmp_path, 1, {})

    def killed(folder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.step("first", killed)
    assert list(Run(tmp_path, 1, {}).done) == ["second"]
    calls = []
    chain(Run(tmp_path, 1, {}), calls, seed=1)
    assert calls == ["first", "second"]


def test_what_a_kill_left_half_written_is_swept_away(tmp_path):
    (tmp_path / "first").mkdir()
    left = tmp_path / "first" / ".labels.json.x7.part"
    left.write_text("[1, 2")
    chain(Run(tmp_path, 1, {}), [])
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

    Run(tmp_path, 1, {}).step("stage1", work)
    for name in ("README.md", "log.txt", "note.txt"):
        (tmp_path / "stage1" / name).write_text("mine")
    run = Run(tmp_path, 1, {})
    run.step("stage1", lambda folder: pytest.fail("done again"))
    assert list(run.files["stage1"]) == ["encoder.json"]


def test_a_run_without_records_is_taken_as_it_is(tmp_path):
    """As earlier versions left it."""
    state = {"settings": {"stage 1": {}}, "done": {"first": {"n": 1}}}
    (tmp_path / "state.json").write_text(json.dumps(state))
    calls = []
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "labels.json").write_text("[1]")
    chain(Run(tmp_path, 1, {}), calls)
    assert calls == ["second"]
    chain(Run(tmp_path, 1, {}), calls)
    assert calls == ["second"]


def test_a_failed_step_is_tried_again(tmp_path):
    run = Run(tmp_path, 1, {})
    run.step("export/stage1", lambda folder: {"failed": "no audio"})
    run = Run(tmp_path, 1, {})
    assert not run.done and run.failed == {"export/stage1": "no audio"}
    run.step("export/stage1", lambda folder: {"threshold": 0.5})
    run = Run(tmp_path, 1, {})
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
    chain(Run(tmp_path, 1, {}), [])
    harm(tmp_path / "state.json")
    with pytest.raises(ValueError, match="state.json is damaged"):
        Run(tmp_path, 1, {})


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"done": {}}', '{"done": [], "settings": {}}', "[" * 9999]
    + ['{"done": {"../x": {}}, "settings": {}}', '"\udce9"'],
)
def test_damaged_state_is_named(tmp_path, text):
    path = tmp_path / "state.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="state.json is damaged"):
        Run(tmp_path, 1, {})


def test_a_state_changed_on_purpose(tmp_path):
    """Without its checksum it is taken as it is."""
    chain(Run(tmp_path, 1, {}), [])
    state = json.loads((tmp_path / "state.json").read_text())
    del state["checksum"], state["done"]["second"]
    (tmp_path / "state.json").write_text(json.dumps(state))
    calls = []
    chain(Run(tmp_path, 1, {}), calls)
    assert calls == ["second"]


def test_metrics_without_a_state_belong_to_another_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="metrics of a run but no state.json"):
        Run(tmp_path, 1, {})
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"


def test_settings_are_on_record_before_the_first_step_ends(tmp_path):
    """A kill in the first step must not let others go on with its work."""

    def killed(folder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path, 1, {"lr": 1}).step("stage1", killed)
    with pytest.raises(ValueError, match="lr: was 1, is 2"):
        Run(tmp_path, 1, {"lr": 2})


def test_altered_metrics_are_reported(tmp_path, caplog):
    run = Run(tmp_path, 1, {})
    run.log(stage=1, phase="simclr", epoch=1, loss=1.0)
    run.step("stage1", lambda folder: {})
    run.log(stage=1, phase="after simclr", epoch=2, loss=1.0)
    path = tmp_path / "metrics.jsonl"
    truncate(path)
    Run(tmp_path, 1, {})  # only the step under way has lost a line
    assert "altered" not in caplog.text
    path.write_text(path.read_text().replace("simclr", "gated", 1))
    Run(tmp_path, 1, {})
    assert "metrics.jsonl has been altered" in caplog.text


def test_records_of_a_step_done_again_take_the_place_of_the_old(tmp_path):
    run = Run(tmp_path, 1, {})
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
    fork(run.folder, tmp_path / "new", ["first"])
    truncate(tmp_path / "new" / "first" / "labels.json")
    calls = []
    chain(Run(tmp_path / "new", 2, {"gate": "none"}), calls)
    assert calls == ["first", "second"]
