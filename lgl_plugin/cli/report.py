"""`lgl report`: prints the figures of runs and writes their pages.

> lgl report results/lgl/1
> lgl report results/lgl/1 results/lgl/2  # also a page that compares them
"""

import argparse
import pathlib


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    parser.add_argument("runs", nargs="+", help="output_folder of a run")


def run(runs: list[str]) -> None:
    """Prints a table for each kind of run, and writes pages.

    Runs of one kind differ only in their seeds; their table has the means.
    """
    from lgl_plugin.report.build import write_report
    from lgl_plugin.report.comparison import group_by_settings
    from lgl_plugin.report.results import Results
    from lgl_plugin.runs.metrics_log import table

    # Without duplicates: a run named twice would count twice in a mean.
    runs = [*{pathlib.Path(run).resolve(): run for run in runs}.values()]
    groups = group_by_settings([Results(run) for run in runs])
    for name, members in groups.items():
        if len(groups) > 1:
            print(f"\n{name}:\n")
        print(table([run.rows for run in members.values()]))
    pages = [write_report([run]) for run in runs]
    if len(runs) > 1:
        pages.append(write_report(runs))
    print("", *(f"Page: {page}" for page in pages), sep="\n")
