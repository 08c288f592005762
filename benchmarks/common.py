"""Tools that all benchmarks share: timing, peak memory, a table, a json file.

A benchmark names its variants, times them alternately with `measure` and
hands rows to `report`:

> parser = arguments(__doc__)
> options = parser.parse_args()
> found = measure({"slow": slow, "fast": fast}, options.repeats, options.device)
> rows = [{"what": name, **figures} for name, figures in found.items()]
> report(rows, "slow against fast", options.json)
"""

import argparse
import contextlib
import ctypes
import datetime
import json
import os
import pathlib
import resource
import statistics
import time

import numpy as np
import soundfile
import torch

from lgl_plugin.runs.provenance import device_name
from lgl_plugin.utils.device import peak_bytes
from lgl_plugin.utils.tables import markdown_table

MIB = 2**20
RATE = 16000


def arguments(description, device=True, repeats=True):
    """A parser with the options that benchmarks share.

    `device` and `repeats` are to be False where nothing reads them: the option
    would be accepted, and change nothing.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # Of what is handed on, --seed would be taken for --seeds.
        allow_abbrev=False,
    )
    if device:
        parser.add_argument("--device", default="cpu")
    # A string: argparse hands a default on to `type` only if it is one.
    parser.add_argument("--threads", type=threads, default=f"{os.cpu_count()}")
    if repeats:
        parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="where to write the figures")
    return parser


def threads(number):
    """Lets torch use so many threads; returns the number."""
    torch.set_num_threads(int(number))
    return int(number)


def synchronize(device):
    """Waits until the device has done all that it was told to."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def reset_peaks(device="cpu"):
    """Forgets peak memory so far, where the system allows it."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # the peak is then that of the process
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peaks(device="cpu"):
    """Peak memory in MiB since the last reset: of this process, of the GPU."""
    try:
        status = pathlib.Path("/proc/self/status").read_text()
        host = int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        host = peak_bytes(resource.getrusage(resource.RUSAGE_SELF)) / MIB
    figures = {"host_mib": host}
    if torch.device(device).type == "cuda":
        figures["gpu_mib"] = torch.cuda.max_memory_allocated(device) / MIB
    return figures


def measure(variants, repeats=5, device="cpu"):
    """Times variants alternately, so that a slow minute hits all alike.

    Arguments
    ---------
    variants : dict
        From name to a callable without arguments.
    repeats : int
        Timed calls of each, after one that is not.
    device : str
        Waited for before and after each call.

    Returns
    -------
    dict
        From name to {"median", "lowest", "highest"} in seconds and the
        largest "host_mib" (with all that the process holds) and "gpu_mib".
    """
    seconds = {name: [] for name in variants}
    largest = {name: {} for name in variants}
    for repeat in range(repeats + 1):
        for name, call in variants.items():
            reset_peaks(device)
            synchronize(device)
            started = time.perf_counter()
            call()
            synchronize(device)
            if repeat > 0:
                seconds[name].append(time.perf_counter() - started)
                for key, value in peaks(device).items():
                    largest[name][key] = max(value, largest[name].get(key, 0))
    return {
        name: {
            "median": statistics.median(times),
            "lowest": min(times),
            "highest": max(times),
            **largest[name],
        }
        for name, times in seconds.items()
    }


def machine(device="cpu"):
    """Describes the machine, as a dict of plain values."""
    facts = {
        "device": str(device),
        "cpu": device_name("cpu"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    if torch.device(device).type == "cuda":
        facts["gpu"] = device_name(device)
    return facts


def report(rows, title, json_path=None, device="cpu"):
    """Prints rows as a markdown table and writes them to a json file.

    Arguments
    ---------
    rows : list of dict
        From column to text or number; columns may be missing in some rows.
    title : str
        Printed above the table.
    json_path : str, optional
        Gets {"title", "machine", "rows"}, with all digits.
    device : str
        What it ran on.
    """
    facts = machine(device)
    print(f"{title}\n\n{', '.join(f'{k} {v}' for k, v in facts.items())}\n")
    print(table(rows))
    if json_path:
        content = {"title": title, "machine": facts, "rows": rows}
        with open(json_path, "w", encoding="utf-8") as out:
            json.dump(content, out, indent=2)


def table(rows):
    """A markdown table of rows, dicts of which some may lack a column."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = ([_cell(row.get(name, "")) for name in columns] for row in rows)
    return markdown_table(columns, cells)


def _cell(value):
    """A number short enough to read, anything else as it is."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def write_audio(folder, number, low, high, fade=None):
    """Writes files of noise, `low` to `high` seconds long, 16 bit."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    paths = [folder / f"{i}.wav" for i in range(number)]
    for path in paths:
        samples = rng.normal(0, 0.1, round(rng.uniform(low, high) * RATE))
        if fade:  # a room: the direct path, then 60 dB down in so many s
            samples *= 10 ** (-3 * np.arange(len(samples)) / RATE / fade)
            samples[0] = 0.9
        soundfile.write(path, samples.clip(-1, 1), RATE)
    return paths


def give_freed_memory():
    """glibc's defaults, which `keep_freed_memory` changes."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(-4, 65536)
        ctypes.CDLL(None).mallopt(-1, 128 * 1024)
