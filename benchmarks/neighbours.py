"""Training steps beside other busy processes, by OpenMP's waiting policy.

> python benchmarks/neighbours.py --neighbours=0,1,2,8

OpenMP reads how its threads wait once, when torch is loaded: each variant is a
process of its own, which trains the small preset's encoder on noise. By
default, threads that wait for each other spin, and take the time that a
neighbour, or their own other thread, would need. `lgl` and train_lgl.py set
GOMP_SPINCOUNT=1000. The floor is the step on an idle machine.
"""

import json
import os
import pathlib
import subprocess
import sys

from common import arguments, report

from lgl_plugin.utils.threads import SPINS

HPARAMS = pathlib.Path(__file__).parents[1] / "hparams"
YAML = HPARAMS / "small_stage1.yaml"
POLICIES = {
    "default": {},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": SPINS},
}
STEP = """
import json, sys, time
import torch
from lgl_plugin.runs.settings import load_settings
steps, batch, threads = map(int, sys.argv[1:4])
torch.set_num_threads(threads)
settings, _ = load_settings(sys.argv[4], "data_folder: x")
encoder = settings.new_encoder()
optimizer = torch.optim.Adam(encoder.parameters(), fused=True)
waveforms = torch.randn(batch, 16000)
seconds = []
for _ in range(steps + 1):
    started = time.perf_counter()
    encoder(waveforms).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    seconds.append(time.perf_counter() - started)
print(json.dumps(sorted(seconds[1:])))
"""


def seconds_per_step(policy, options):
    """Runs steps in a process of its own; returns each one's seconds."""
    set_here = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    others = {k: v for k, v in os.environ.items() if k not in set_here}
    words = (options.steps, options.batch, options.threads, YAML)
    done = subprocess.run(
        [sys.executable, "-c", STEP, *map(str, words)],
        env={**others, **POLICIES[policy]},
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main(options):
    """Measures each policy beside each number of neighbours, alternately."""
    found = {}
    for n_neighbours in map(int, options.neighbours.split(",")):
        busy = [
            subprocess.Popen([sys.executable, "-c", "while True: pass"])
            for _ in range(n_neighbours)
        ]
        try:
            for _ in range(options.repeats):
                for policy in POLICIES:
                    seconds = seconds_per_step(policy, options)
                    found.setdefault((n_neighbours, policy), []).extend(seconds)
        finally:
            for process in busy:
                process.kill()
    rows = []
    for (n_neighbours, policy), seconds in found.items():
        seconds.sort()
        rows.append(
            {
                "neighbours": n_neighbours,
                "waiting": policy,
                "median s": f"{seconds[len(seconds) // 2]:.2f}",
                "lowest s": f"{seconds[0]:.2f}",
                "highest s": f"{seconds[-1]:.2f}",
            }
        )
    report(rows, "seconds a training step", options.json)


if __name__ == "__main__":
    parser = arguments(__doc__, device=False)
    parser.set_defaults(repeats=3)
    parser.add_argument("--neighbours", default="0,1,2,8")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    main(parser.parse_args())
