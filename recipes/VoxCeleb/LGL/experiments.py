"""Trains runs of a recipe that differ in a few settings, for several seeds.

A run that differs from another only in late steps, such as with and without the
gate, copies the earlier steps of that run (`fork`). Only the steps that differ
are trained.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import subprocess
import sys

from tqdm import tqdm

from lgl_plugin.runs.arguments import (
    goes_to,
    key_of,
    keys_of_stages,
    parse_arguments,
    run_options,
)
from lgl_plugin.runs.metrics_log import read_metrics
from lgl_plugin.runs.run import fork, stage1_steps
from lgl_plugin.runs.settings import (
    did_you_mean,
    plain_settings_of,
    settings_of,
)
from lgl_plugin.runs.state import read_state
from lgl_plugin.utils.device import check_device
from lgl_plugin.utils.files import write_json

# Steps that a variant copies from its parent.
STAGE1 = ("baselines", "stage1")
EMBEDDED = (*STAGE1, "iter1/embeddings")
CLUSTERED = (*EMBEDDED, "iter1/labels")
CLASSIFIED = (*CLUSTERED, "iter1/classifier")

KEEP_LABELS = "--correct_labels=null"
NO_GATE = ("--gate=!new:lgl_plugin.nnet.gates.NoGate", KEEP_LABELS)


MARK = "commands.json"  # marks a finished run
# Options that `train_one` sets.
OWN = {"seed", "output_folder", "selection_study"}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A run of Stage II.

    `options` override the yaml in addition to the options of all runs; "<base>"
    stands for the base's folder. The steps in `keep` (None: all) are copied
    from its `parent`. "base" has no options of its own, also trains Stage I,
    and logs every criterion of selection there. `script` replaces the recipe.
    """

    name: str
    options: tuple = ()
    keep: tuple = STAGE1
    parent: str = "base"
    script: str | None = None


WITHOUT = Variant("without-gate", NO_GATE, CLASSIFIED)
CEILING = Variant("ceiling", (), STAGE1, script="ceiling.py")


def make_parser(description, seeds):
    """Makes a parser of a study's options; it leaves others to the recipe."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --seed is the recipe's, not short for --seeds
    )
    parser.add_argument("--seeds", type=whole_numbers, default=seeds)
    return parser


def whole_numbers(text):
    """Reads --seeds."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text}: give whole numbers, such as 1,2,3"
        ) from None


def count(text):
    """Reads a number of runs or processes."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give 1 or more")
    return int(text)


def run_all(jobs, train, calls):
    """Calls `train` with each tuple of arguments, `jobs` calls in parallel.

    The first failure cancels all waiting calls.
    """
    with (
        tqdm(total=len(calls), unit="run") as progress,
        concurrent.futures.ThreadPoolExecutor(jobs) as pool,
    ):
        waiting = [pool.submit(train, *call) for call in calls]
        try:
            for done in concurrent.futures.as_completed(waiting):
                done.result()
                progress.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class Experiment:
    """Trains variants and reads what they logged.

    Runs by `recipe` and the `yamls` of both stages lie in `folder`, as
    `seed<seed>/<variant>`. There are `jobs` at a time, which share the cores,
    each of `nproc` processes. `options` are overrides for all; a key that only
    one of the stages takes goes to that stage. ValueError if one is no setting.

    >>> folder = getfixture("tmp_path")
    >>> yamls = [folder / "stage1.yaml", folder / "stage2.yaml"]
    >>> for yaml in yamls:
    ...     _ = yaml.write_text("crop_seconds: 3.0")
    >>> options = ["--crop_seconds=2.0"]
    >>> runs = Experiment("train_lgl.py", yamls, folder, [1, 2], 2, options)
    >>> runs.settings
    {'crop_seconds': 2.0}
    >>> runs.run_folder(seed=2, name="without-gate").parts[-2:]
    ('seed2', 'without-gate')
    """

    def __init__(
        self, recipe, yamls, folder, seeds, jobs=1, options=(), nproc=1
    ):
        self.recipe = pathlib.Path(recipe)
        self.yamls = [str(yaml) for yaml in yamls]
        self.folder = pathlib.Path(folder)
        self.seeds = seeds
        self.jobs, self.nproc = jobs, nproc
        self.launch = [sys.executable]
        if nproc > 1:
            self.launch += ["-m", "torch.distributed.run", "--standalone"]
            self.launch += [f"--nproc_per_node={nproc}"]
        self.keys = keys_of_stages(yamls)
        _check(options, self.keys)
        self.options = [
            [
                word
                for word in options
                if goes_to(key_of(word), stage, self.keys)
            ]
            for stage in (1, 2)
        ]

    @functools.cached_property
    def settings(self):
        """Stage II's settings with the overrides of all runs, as plain data."""
        return plain_settings_of([self.yamls[1], *self.options[1]])

    @functools.cached_property
    def device(self):
        """The device of the runs, on which their encoders also embed."""
        words = [self.yamls[1], *self.options[1]]
        return check_device(parse_arguments(words)[1].get("device"))

    @functools.cached_property
    def stage1_step(self):
        """The step of "base" whose encoder Stage II starts from."""
        settings = plain_settings_of([self.yamls[0], *self.options[0]])
        return stage1_steps({"stage 1": settings})[-1]

    def run_folder(self, seed, name="base"):
        """Returns the folder of a variant's run."""
        return self.folder / f"seed{seed}" / name

    def records(self, seed, name="base"):
        """Returns the records of a variant, as `read_metrics` does."""
        return read_metrics(self.run_folder(seed, name))

    def values(self, figure, name="base", **where):
        """Lists a figure, by seed, of the record that matches `where`.

        Raises KeyError if a run has no such record.
        """
        figures = []
        for seed in self.seeds:
            for record in self.records(seed, name):
                if all(record.get(key) == of for key, of in where.items()):
                    figures.append(record.get(figure))
                    break
            else:
                run = self.run_folder(seed, name)
                raise KeyError(f"{run} has logged nothing of {where}")
        return figures

    def train(self, variants):
        """Trains "base", then variants, whose parents must come first.

        Raises ValueError, before any run, if a variant's settings are refused,
        and RuntimeError, with the end of the run's output, if a run fails.
        """
        for variant in (Variant("base"), *variants):
            self._try_settings(variant)
        levels = {"base": 0}
        rounds = [[Variant("base")]]
        for variant in variants:
            if variant.name in levels:
                continue
            level = levels[variant.name] = levels[variant.parent] + 1
            rounds += [[] for _ in range(level + 1 - len(rounds))]
            rounds[level].append(variant)
        for variants in rounds:
            calls = itertools.product(self.seeds, variants)
            run_all(self.jobs, self.train_one, [*calls])

    def _try_settings(self, variant):
        """Builds the settings of a variant that is not done; raises if bad."""
        for seed in self.seeds:
            if not self._is_done(seed, variant):
                for command in self._commands(seed, variant):
                    settings_of(command)

    def _commands(self, seed, variant):
        """Returns the arguments of the script for each stage of a run."""
        folder = self.run_folder(seed, variant.name)
        common = [f"--output_folder={folder}", f"--seed={seed}"]
        own = {key_of(option): option for option in self.options[1]}
        own.update({key_of(option): option for option in variant.options})
        own = [
            option.replace("<base>", str(self.run_folder(seed).absolute()))
            for option in own.values()
        ]
        commands = [[self.yamls[1], *common, *own]]
        if variant.name == "base":
            # Measuring each epoch takes time, but changes no result.
            study = "--selection_study=True"
            commands.insert(
                0, [self.yamls[0], *common, study, *self.options[0]]
            )
        return commands

    def _is_done(self, seed, variant):
        """Returns True if the same commands have trained a variant."""
        mark = self.run_folder(seed, variant.name) / MARK
        return mark.exists() and (
            json.loads(mark.read_text()) == self._commands(seed, variant)
        )

    def train_one(self, seed, variant):
        """Trains a variant with a seed, unless that is done."""
        if self._is_done(seed, variant):
            return
        folder = self.run_folder(seed, variant.name)
        commands = self._commands(seed, variant)
        if variant.name != "base":
            parent = self.run_folder(seed, variant.parent)
            done, keep = read_state(parent)["done"], variant.keep
            if keep is None:
                keep = list(done)
            elif keep and "ssps" in done:  # Stage I's last step, if done
                keep = [*keep, "ssps"]
            fork(parent, folder, keep)
        recipe = self.recipe.with_name(variant.script or self.recipe.name)
        # torchrun gives each process one thread; `all_cores` lifts that limit.
        threads = None
        if self.nproc == 1:
            share = max(1, (os.cpu_count() or 1) // self.jobs)
            threads = os.environ.get("OMP_NUM_THREADS", share)
        for command in commands:
            command = [*self.launch, recipe, *command]
            run_command(command, folder / "printed.txt", threads)
        write_json(folder / MARK, commands)


def run_command(command, printed, threads):
    """Runs a command, and appends its output to the file `printed`.

    `threads` is the number of OpenMP threads; None leaves it to the command.
    Returns the resources that the command used. Raises RuntimeError, with the
    end of the output, if the command fails.
    """
    printed.parent.mkdir(parents=True, exist_ok=True)
    chosen = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    with open(printed, "ab") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **chosen},
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        lines = printed.read_text("utf-8", "replace").splitlines()[-15:]
        raise RuntimeError(
            f"{' '.join(map(str, command))} failed; the end of {printed}:\n"
            + "\n".join(lines)
        )
    return usage


def _check(options, keys):
    """Refuses option names and forms that the first training would refuse."""
    known = set().union(*keys, run_options())
    for option in options:
        if not option.startswith("--"):
            raise ValueError(f"{option}: give settings as --key=value")
        if key_of(option) not in known:
            hint = did_you_mean(key_of(option), known)
            raise ValueError(f"there is no option --{key_of(option)}{hint}")
        if key_of(option) in OWN:
            raise ValueError(f"{option}: each run gets its own, see --seeds")
