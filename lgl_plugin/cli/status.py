"""`lgl status`: tells how far a run is, what it shows and what comes next.

> lgl status results/lgl/1
"""

from __future__ import annotations

import argparse
import pathlib
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lgl_plugin.report.results import Results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    parser.add_argument("run_folder", metavar="run", help="its output_folder")


def run(run_folder: str) -> None:
    """Prints steps, last figures, warnings and the next command."""
    from lgl_plugin.report.results import Results
    from lgl_plugin.runs.state import is_adaptation, read_state
    from lgl_plugin.training.health import findings

    folder = pathlib.Path(run_folder)
    if is_adaptation(folder):
        print("\n".join(adaptation(folder, read_state(folder))))
        return
    results = Results(run_folder)
    holder = writer_of(results.folder)
    steps = results.steps
    left = results.left
    n_done = len(steps) - len(left)
    print(f"{run_folder}: {n_done} of {len(steps)} steps are done")
    for step in steps:
        state, remark = "to come", ""
        if step in results.failed:
            state, remark = "failed", results.failed[step]
        elif step not in left:
            state = "done"
        elif step == left[0]:
            remark = progress(results, step)
            if holder or remark:
                state = "under way" if holder else "stopped"
        print(f"  {state:<10} {step:<20} {remark}".rstrip())
    if steps and "stage 2" not in results.settings:
        print("  to come    Stage II has not begun")
    for line in last_figures(results):
        print(line)
    for _, text in findings(results.records):
        print(f"Warning: {text}")
    if holder:
        print(f"Being written by {holder}: wait for its end")
        return
    if failure := results.failure():
        print(f"Failed: {failure}")
    print(": ".join(results.next_command()))


def adaptation(folder: pathlib.Path, found: dict[str, Any]) -> Iterator[str]:
    """Yields lines on the folder of an `lgl adapt`: steps with their verdicts.

    If the training, a separate run, is unfinished, its progress follows.
    """
    from lgl_plugin.adaptation.rungs import (
        SPLIT,
        START,
        TRAINED,
        Rung,
        steps_of,
    )
    from lgl_plugin.adaptation.verdict import Verdict
    from lgl_plugin.report.results import Results
    from lgl_plugin.runs.pretrained import YAML
    from lgl_plugin.runs.provenance import (
        command_of,
        from_directory,
        into_folder,
        read_starts,
    )

    holder, starts = writer_of(folder), read_starts(folder)
    done, failed = found["done"], found["failed"]
    start = starts[-1] if starts else {}
    command, again = command_of(start, folder), "the same command"
    if command:
        again = from_directory(start, command)
    train = TRAINED in done or "--train" in shlex.split(command or "")
    steps = steps_of(train)
    missing = [step for step in steps if step not in done]
    n_done, any_kept = len(steps) - len(missing), False
    yield f"{folder}: {n_done} of {len(steps)} steps are done"
    for step in steps:
        state, remark = "to come", ""
        if step in done:
            state = "done"
            if step not in (START, SPLIT):
                rung = Rung(step, Verdict(**done[step]))
                any_kept = any_kept or rung.kept
                kept = "kept" if rung.kept else "not kept"
                remark = f"{kept}, {rung.verdict}"
        elif step == missing[0]:
            state = "under way" if holder else "stopped"
            if step in failed and not holder:
                state, remark = "failed", failed[step]
        yield f"  {state:<10} {step:<20} {remark}".rstrip()
    begun = sorted(
        folder.glob("training*/metrics.jsonl"), key=lambda p: p.stat().st_mtime
    )
    if missing == [TRAINED] and begun:
        training = begun[-1].parent
        results = Results(training)
        for step in results.left[:1]:
            yield f"  {training}: {step} {progress(results, step)}".rstrip()
        if not holder and (failure := results.failure()):
            yield f"Failed: {failure}"
    exported = folder / "export" / "adapted"
    is_written = (exported / YAML).exists()
    if holder:
        yield f"Being written by {holder}: wait for its end"
    elif missing and missing[0] in failed:
        # With more recordings, a folder that has verdicts already is refused.
        place = ", into a new folder" if done.keys() - {START} else ""
        if place and command:
            again = from_directory(start, into_folder(command, "NEW"))
        yield f"Add recordings, then{place}: {again}"
    elif missing or any_kept and not is_written:
        yield f"Go on with: {again}"
    elif any_kept:
        page = folder / "report" / "index.html"
        yield f"Next: {page}; lgl who {exported} AUDIO OUT"
    else:
        yield "No rung is kept: your encoder stays as it is"


def progress(results: Results, step: str) -> str:
    """Returns the progress of a step that trains; "" before its first epoch."""
    from lgl_plugin.runs.run import stage_of, step_of

    epochs = [
        r for r in results.records if r.get("epoch") and step_of(r) == step
    ]
    if not epochs:
        return ""
    phase = step.split("/")[-1]
    key = "number_of_epochs" if phase == "stage1" else f"{phase}_epochs"
    total = results.settings.get(stage_of(step), {}).get(key)
    last = epochs[-1]
    text = f"epoch {last['epoch']}" + (f" of {total}" if total else "")
    seconds = sum(record.get("seconds") or 0 for record in epochs)
    if total and seconds:
        left = seconds / len(epochs) * (total - last["epoch"]) / 60
        text += f", {left:.0f} minutes left in it"
    return text


def last_figures(results: Results) -> Iterator[str]:
    """Yields lines of the latest epoch's figures and of the latest EER."""
    from lgl_plugin.runs.metrics_log import figures_text
    from lgl_plugin.runs.run import step_of

    epochs = [record for record in results.records if record.get("epoch")]
    if epochs:
        last = epochs[-1]
        place = f"{step_of(last)}, epoch {last['epoch']}"
        yield f"{place}: {', '.join(figures_text(last))}"
    scored = [r for r in results.records if r.get("eer") is not None]
    if scored:
        yield f"{step_of(scored[-1])}: EER {scored[-1]['eer']:.2f} %"


def writer_of(folder: pathlib.Path) -> str | None:
    """Returns the holder of a run folder's lock, or None."""
    try:
        import fcntl
    except ImportError:  # Windows, where a locked file cannot be read either
        return None
    from lgl_plugin.runs.lock import LOCK

    try:
        with open(folder / LOCK, encoding="utf-8", errors="replace") as lock:
            try:
                # A shared lock, which is released when the file is closed.
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return lock.read().strip() or "another process"
    except OSError:  # no lock, or a file system that cannot lock
        pass
    return None
