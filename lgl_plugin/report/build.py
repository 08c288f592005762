"""Writes the report of one run or of several: a page with its figures.

> lgl report results/lgl/1
> lgl report results/lgl/1 results/lgl/2 results/lgl/3

Each run's folder gets a page, `report/index.html`, and its figures as PNG and
SVG beside it. Several runs are also compared: the first run's folder gets
`report/comparison/index.html`, with means and ranges. Pages embed their
content and open offline.
"""

import os
import pathlib
import shlex
from collections.abc import Sequence

from speechbrain.utils.distributed import main_process_only
from speechbrain.utils.logger import get_logger

from lgl_plugin.report import comparison, sections
from lgl_plugin.report.overview import overview
from lgl_plugin.report.page import Page
from lgl_plugin.report.results import Results
from lgl_plugin.utils.files import check_writable

logger = get_logger(__name__)


def write_report(folders: Sequence[str | os.PathLike]) -> pathlib.Path:
    """Writes the page of a run, or the comparison of several; returns its path.

    Raises FileNotFoundError if a folder is no run's, ValueError if it is that
    of an `lgl adapt`, OSError if the page cannot be written. The page itself
    names anything else that is missing or damaged.
    """
    runs = [Results(folder) for folder in folders]
    folder = runs[0].folder / "report"
    check_writable(folder)  # before figures are drawn
    if len(runs) == 1:
        (run,) = runs
        page = Page(folder, f"Run {run.name}: loss-gated learning")
        parts = _collect(page, sections.SECTIONS, run)
        # Collected last, because it lists the parts that failed.
        introduction = page.collect(overview, run, page.failures)
    else:
        title = f"Comparison of {len(runs)} runs: loss-gated learning"
        page = Page(folder / "comparison", title)
        parts = _collect(page, comparison.SECTIONS, runs)
        introduction = page.collect(comparison.overview, runs, page.folder)
    command = shlex.join(["lgl", "report", *map(str, folders)])
    return page.write(introduction, parts, command)


def _collect(page, parts, data):
    """Returns the blocks of each section."""
    return {
        title: [block for part in each for block in page.collect(part, data)]
        for title, each in parts.items()
    }


@main_process_only
def try_to_write_report(folder: str | os.PathLike) -> None:
    """Writes a run's page; a failure is logged and does not end the run."""
    try:
        logger.info("The run's page: %s", write_report([folder]))
    except OSError as error:  # its message says what to do
        logger.warning("The run's page was not written: %s", error)
    except Exception:
        logger.warning("The run's page was not written", exc_info=True)
