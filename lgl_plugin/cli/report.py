"""`lgl report`: prints the figures of runs and writes their pages.

> lgl report results/lgl/1
> lgl report results/lgl/1 results/lgl/2  # also a page that compares them
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    parser.add_argument("runs", nargs="+", help="output_folder of a run")


def run(runs: list[str]) -> None:
    """Prints the table of the runs named, and writes their pages."""
    from lgl_plugin.report.build import write_report
    from lgl_plugin.report.results import Results
    from lgl_plugin.runs.metrics_log import table

    print(table([Results(run).rows for run in runs]))
    pages = [write_report([run]) for run in runs]
    if len(runs) > 1:
        pages.append(write_report(runs))
    print("", *(f"Page: {page}" for page in pages), sep="\n")
