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
    from lgl_plugin.runs.state import read_state
    from lgl_plugin.training.health import findings

    folder = pathlib.Path(run_folder)
    if (folder / "state.json").exists():
        state = read_state(folder)
        if "stage 0" in state["settings"]:
            print("\n".join(adaptation(folder, state)))
            return
    results = Results(run_folder)
    holder = writer_of(results.folder)
    steps = results.steps
    done = [step for step in steps if step in results.done]
    print(f"{run_folder}: {len(done)} of {len(steps)} steps are done")
    begun = [step for step in steps if step not in results.done]
    for step in steps:
        state, remark = "done", ""
        if step in results.failed:
            state, remark = "failed", results.failed[step]
        elif step not in results.done:
            current = step == begun[0]
            state = "under way" if current and holder else "to come"
            remark = progress(results, step) if current else ""
            if current and remark and not holder:
                state = "stopped"
        print(f"  {state:<10} {step:<20} {remark}".rstrip())
    if "stage 2" not in results.settings:
        print("  to come    Stage II has not begun")
    for line in last_figures(results):
        print(line)
    for _, text in findings(results.records):
        print(f"Warning: {text}")
    print(next_command(results, run_folder, holder, begun))


def adaptation(folder: pathlib.Path, state: dict[str, Any]) -> Iterator[str]:
    """Yields lines on the folder of an `lgl adapt`, each rung with its verdict.

    Training in there is a run of its own, whose steps follow.
    """
    from lgl_plugin.inference.rungs import BACKENDS, TRAINED, Rung
    from lgl_plugin.inference.verdict import Verdict
    from lgl_plugin.report.results import Results
    from lgl_plugin.runs.provenance import read_starts

    holder, done = writer_of(folder), state["done"]
    starts = read_starts(folder)
    command = starts[-1].get("command") if starts else None
    steps = ["start", *BACKENDS]
    if TRAINED in done or "--train" in shlex.split(command or ""):
        steps.append(TRAINED)
    missing = [step for step in steps if step not in done]
    n_done = len(steps) - len(missing)
    yield f"{folder}: {n_done} of {len(steps)} steps are done"
    for step in steps:
        remark, line = "", "to come"
        if step in done:
            line = "done"
            if step != "start":
                rung = Rung(step, Verdict(**done[step]))
                kept = "kept" if rung.kept else "not kept"
                remark = f"{kept}, {rung.verdict}"
        elif step == missing[0]:
            line = "under way" if holder else "stopped"
        yield f"  {line:<10} {step:<20} {remark}".rstrip()
    begun = sorted(
        folder.glob("training*/metrics.jsonl"), key=lambda p: p.stat().st_mtime
    )
    if missing == [TRAINED] and begun:
        training = begun[-1].parent
        results = Results(training)
        left = [s for s in results.steps if s not in results.done]
        for step in left[:1]:
            yield f"  {training}: {step} {progress(results, step)}".rstrip()
    exported = folder / "export" / "adapted"
    if holder:
        yield f"Being written by {holder}: wait for its end"
    elif missing:
        yield f"Go on with: {command or 'the same command'}"
    elif (exported / "hyperparams.yaml").exists():
        page = folder / "report" / "index.html"
        yield f"Next: {page}; lgl who {exported} AUDIO OUT"
    else:
        yield "Your encoder is best as it is: no rung is kept"


def progress(results: Results, step: str) -> str:
    """Returns how far a step of training is; "" before its first epoch."""
    from lgl_plugin.runs.run import step_of

    epochs = [
        record
        for record in results.records
        if record.get("epoch") and step_of(record) == step
    ]
    if not epochs:
        return ""
    key = {
        "stage1": "number_of_epochs",
        "ssps": "ssps_epochs",
        "classifier": "classifier_epochs",
        "gated": "gated_epochs",
        "large_margin": "large_margin_epochs",
    }[step.split("/")[-1]]
    stage = "stage 2" if "/" in step else "stage 1"
    total = results.settings.get(stage, {}).get(key)
    last = epochs[-1]
    text = f"epoch {last['epoch']}" + (f" of {total}" if total else "")
    seconds = sum(record.get("seconds") or 0 for record in epochs)
    if total and seconds:
        left = seconds / len(epochs) * (total - last["epoch"]) / 60
        text += f", {left:.0f} minutes left in it"
    return text


def last_figures(results: Results) -> Iterator[str]:
    """Yields lines of the latest epoch's figures and of the latest EER."""
    names = {
        "loss": "loss {:.3f}",
        "accuracy": "accuracy {:.3f}",
        "lr": "learning rate {:.2g}",
        "selected_share": "selected {:.0%}",
        "pseudo_eer": "pseudo-trials' EER {:.2f} %",
        "mean_cosine": "cosine of strangers {:.2f}",
        "effective_dimensions": "effective dimensions {:.1f}",
    }
    epochs = [record for record in results.records if record.get("epoch")]
    if epochs:
        last = epochs[-1]
        figures = [
            text.format(last[name])
            for name, text in names.items()
            if last.get(name) is not None
        ]
        print_of = ", ".join(figures)
        yield f"{place(last)}, epoch {last['epoch']}: {print_of}"
    scored = [r for r in results.records if r.get("eer") is not None]
    if scored:
        yield f"{place(scored[-1])}: EER {scored[-1]['eer']:.2f} %"


def place(record: dict) -> str:
    """Names the step that a record belongs to."""
    from lgl_plugin.runs.run import step_of

    return step_of(record)


def next_command(
    results: Results, run_folder: str, holder: str | None, begun: list[str]
) -> str:
    """Returns a line that says what to do now."""
    from lgl_plugin.runs.run import planned_steps

    if holder:
        return f"Being written by {holder}: wait for its end"
    command = results.starts[-1].get("command") if results.starts else None
    if (begun or "stage 2" not in results.settings) and command:
        # `lgl train` does both stages; a recipe's command names one.
        if begun or "train" in shlex.split(command):
            return f"Go on with: {command}"
        return f"Stage I is done. Go on with Stage II, after: {command}"
    exported = [
        results.folder / step
        for step in planned_steps(results.settings)
        if (results.folder / step / "hyperparams.yaml").exists()
        and step.startswith("export/")
    ]
    encoder = exported[-1] if exported else None
    if encoder is None:
        return f"Next: lgl export {run_folder}"
    return (
        f"Next: lgl report {run_folder}; lgl who {encoder} AUDIO OUT; "
        f"lgl verify {encoder} AUDIO --trials LIST --output_folder OUT"
    )


def writer_of(folder: pathlib.Path) -> str | None:
    """Returns who holds a run folder's lock, None if nobody does."""
    try:
        import fcntl
    except ImportError:  # Windows; it does not let one read the file, either
        return None
    from lgl_plugin.runs.lock import LOCK

    try:
        with open(folder / LOCK, encoding="utf-8", errors="replace") as lock:
            try:
                # A shared lock, let go of as the file is closed.
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return lock.read().strip() or "another process"
    except OSError:  # no lock, or a file system that cannot lock
        pass
    return None
