#!/usr/bin/env python3
"""All that decides whether the package works on a GPU, in ten minutes.

> python benchmarks/gpu_check.py
> python benchmarks/gpu_check.py --only parity waits --output=results/parity

Leaves a page, `gpu_check.md`, and all figures, `gpu_check.json`, in the output
folder. A check that fails is reported, and the others go on; each is a process
of its own, so that a fault of the GPU ends one of them. Without a GPU the
CPU's part is done, at small sizes, and the page says what a GPU would be asked.
"""

import argparse
import contextlib
import functools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback

import torch
from common import machine, table

from lgl_plugin.utils.files import atomic_write

HERE = pathlib.Path(__file__).parent
LIMIT = 900  # seconds of a check, after which it is ended
CHECKS = {}  # from name to function, what it tells, and its seconds on a GPU


def check(tells, seconds):
    """Registers a check: from a device to rows, of which some may `fail`."""

    def register(function):
        CHECKS[function.__name__] = function, tells, seconds
        return function

    return register


def on_a_device(name, device):
    """Calls a check of the module of that name, which imports the tests'."""
    import on_a_device

    return getattr(on_a_device, name)(device)


for name, tells, seconds in (
    ("parity", "losses, gradients, embeddings, against float64 on the CPU", 45),
    ("waits", "the host waits for nothing in a step", 30),
    ("precisions", "bfloat16 and float16 beside float32", 20),
    ("compiled", "compiled networks beside eager ones", 90),
    ("one_process", "NCCL, data parallelism and SyncBN, in one process", 20),
):
    CHECKS[name] = functools.partial(on_a_device, name), tells, seconds


@check("augmentation from banks of MUSAN's size", 40)
def augmentation(device):
    sizes = ("--batch=4", "--noises=6", "--rooms=5", "--noise_seconds=4")
    if device != "cpu":  # banks of an hour a kind
        sizes = ("--batch=256", "--noises=470", "--noise_seconds=23")
    return benchmark("augmentation.py", device, *sizes)


@check("k-means of 1,092,009 embeddings, by torch and by faiss-gpu", 90)
def clustering(device):
    sizes = ("--n=3000", "--k=60", "--iterations=5")
    if device != "cpu":
        sizes = ("--n=1092009", "--k=6000")
    rows = benchmark("clustering.py", device, *sizes)
    names = [row["clustering"] for row in rows]
    if not any(name.startswith("faiss") for name in names):
        rows.append({"clustering": f"faiss {device} is not installed"})
    return rows


@check("extraction, one by one and in batches", 45)
def extraction(device):
    sizes = ("--n=4", "--channels=32")
    if device != "cpu":
        sizes = ("--n=600", f"--workers={workers()}")
    return benchmark("extraction.py", device, *sizes)


@check("Stage I at batch 256: memory and utterances a second", 100)
def stage1(device):
    return step(1, device)


@check("Stage II at batch 256: memory and utterances a second", 80)
def stage2(device):
    return step(2, device)


@check("a run of both stages, killed and resumed", 60)
def resumed(device):
    sys.path.append(str(HERE.parent / "tests"))
    import kill

    # A GPU adds in any order: there the run must end, and the page says what
    # is not bit for bit the same.
    others = (word for word in kill.TINY if not word.startswith("--device="))
    kill.TINY = (*others, f"--device={device}")
    rng = random.Random(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        lines = len(kill.make_reference(folder)[1])
        line = rng.randrange(lines // 2, lines)
        last, differ = kill.survive(folder, folder / "killed", 1, line, 0.2)
    fails = "differs from the whole run" if differ and device == "cpu" else ""
    rows = [{"killed after": last, "differs": len(differ), "fails": fails}]
    return rows + [{"killed after": "", "differs": name} for name in differ]


@check("the tests that need a GPU", 40)
def tests(device):
    if device == "cpu":
        return []
    folders = ("tests/clustering", "tests/nnet", "tests/utils/test_nccl.py")
    words = ("-m", "pytest", "-q", "-k", "gpu or cuda or nccl", *folders)
    child = subprocess.run(
        [sys.executable, *words],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
    )
    print(child.stdout, child.stderr, flush=True)
    lines = (child.stdout or child.stderr).splitlines()
    last = lines[-1] if lines else f"status {child.returncode}"
    return [{"tests": last, "fails": last if child.returncode else ""}]


def step(stage, device):
    """Runs step.py; of the paper's sizes on a GPU."""
    sizes = ("--batch=4", "--channels=16", "--steps=1", "--files=6")
    sizes += ("--workers=0", "--crop=0.5", "--clusters=50")
    if device != "cpu":
        sizes = ("--batch=256", "--steps=20", "--warm=10", "--compile")
        sizes += (f"--workers={workers()}",)
    return benchmark("step.py", device, f"--stage={stage}", *sizes)


def workers():
    """How many processes load, beside this one."""
    return max(1, min(16, len(os.sched_getaffinity(0)) - 1))


def benchmark(script, device, *words):
    """Runs a benchmark once; returns the rows of its table."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "rows.json"
        words = (f"--device={device}", "--repeats=1", f"--json={path}", *words)
        if device == "cpu":
            words += ("--threads=1",)
        child = subprocess.run(
            [sys.executable, HERE / script, *words],
            stderr=subprocess.PIPE,
            text=True,
        )
        print(child.stderr, flush=True)
        if child.returncode:
            last = (child.stderr.splitlines() or [""])[-1]
            raise RuntimeError(f"{script}: status {child.returncode}: {last}")
        return json.loads(path.read_text())["rows"]


def run(name, device, path):
    """Does a check in this process; writes its rows, or the error."""
    found = {"rows": [], "error": ""}
    try:
        found["rows"] = CHECKS[name][0](device)
    except Exception as error:
        traceback.print_exc()
        found["error"] = f"{type(error).__name__}: {error}"
    # By a rename: a check that is killed leaves no half of it.
    with atomic_write(path) as out:
        json.dump(found, out)


def outcome(name, device, log):
    """Does a check in a process of its own.

    Returns its rows, what went wrong, if anything, and its seconds.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "found.json"
        words = [f"--device={device}", f"--here={path}", "--only", name]
        child = subprocess.Popen(
            [sys.executable, __file__, *words],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = child.wait(LIMIT)
            ended = f"ended with status {status}"
            if status == 0 and path.exists():
                ended = ""
        except subprocess.TimeoutExpired:
            ended = f"took more than {LIMIT} s"
        finally:
            # And what it started: after Ctrl-C it would go on on the GPU.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        found = {"rows": [], "error": ""}
        if path.exists():
            found = json.loads(path.read_text())
        found["error"] = found["error"] or ended
    rows = found["rows"]
    fails = [row["fails"] for row in rows if row.get("fails")]
    error = found["error"] or "; ".join(dict.fromkeys(fails))
    verdict = "failed" if error else "passed" if rows else "needs a GPU"
    return {
        "check": name,
        "tells": CHECKS[name][1],
        "verdict": verdict,
        "why": error,
        "seconds": time.perf_counter() - started,
        "rows": rows,
    }


def page(found, facts):
    """The outcome as Markdown: all verdicts, then the figures of each."""
    failed = [one["check"] for one in found if one["verdict"] == "failed"]
    verdict = f"failed: {', '.join(failed)}" if failed else "all passed"
    parts = [
        f"# GPU check: {verdict}",
        ", ".join(f"{key} {value}" for key, value in facts.items()),
    ]
    if facts["device"] == "cpu":
        parts.append(
            "No GPU was asked: these are the CPU's parts, at small sizes, "
            "whose times say nothing. The same command on a machine with one "
            "does all."
        )
    parts.append(
        table([{k: v for k, v in o.items() if k != "rows"} for o in found])
    )
    for one in found:
        if one["rows"]:
            parts += [f"## {one['check']}: {one['tells']}", table(one["rows"])]
    return "\n\n".join(parts) + "\n"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=[*CHECKS])
    parser.add_argument("--output", type=pathlib.Path, default="results/gpu")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        run(options.only[0], options.device, options.here)
        return
    # Or a check would go on on the GPU behind a `kill`.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options.output.mkdir(parents=True, exist_ok=True)
    facts, found = machine(options.device), []
    left = {name: CHECKS[name][2] for name in options.only}
    with open(options.output / "gpu_check.log", "w", encoding="utf-8") as log:
        for number, name in enumerate(options.only, 1):
            print(
                f"{number} of {len(options.only)}: {name}, {CHECKS[name][1]}. "
                f"On a GPU {left[name]} s; {sum(left.values()) / 60:.0f} min "
                "to the end",
                flush=True,
            )
            found.append(outcome(name, options.device, log))
            del left[name]
            verdict, why = found[-1]["verdict"], found[-1]["why"]
            print(f"    {verdict}, {found[-1]['seconds']:.0f} s. {why}")
            # After each, so that nothing is lost with the machine.
            content = {"machine": facts, "checks": found}
            (options.output / "gpu_check.json").write_text(
                json.dumps(content, indent=1), encoding="utf-8"
            )
            (options.output / "gpu_check.md").write_text(
                page(found, facts), encoding="utf-8"
            )
    print(f"{options.output / 'gpu_check.md'}")
    failed = any(one["verdict"] == "failed" for one in found)
    sys.exit(failed and options.device != "cpu")


if __name__ == "__main__":
    main()
