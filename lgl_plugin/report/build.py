"""What a run achieved: a table, and a page with all its figures.

> lgl report results/lgl/1
> lgl report results/lgl/1 results/lgl/2 results/lgl/3

Each run's folder gets its page, `report/index.html`, and the page's figures
as PNG and SVG beside it. Several runs are compared: the table gives mean and
spread (lowest to highest), and the first run's folder gets another page,
`report/comparison/index.html`. Pages hold all that they show and open offline.
"""

import datetime

from lgl_plugin.report import comparison, sections
from lgl_plugin.report.page import Page
from lgl_plugin.report.results import Results


def write_report(folders):
    """Writes the page of a run, or the comparison of several.

    Arguments
    ---------
    folders : list of (str or pathlib.Path)
        The run folders. The page and its figures go to the first one's
        `report`, a comparison to its `report/comparison`.

    Returns
    -------
    pathlib.Path
        The page, `index.html`.

    Raises
    ------
    FileNotFoundError
        If there are no metrics in one of the folders. Whatever else is
        missing or damaged is said on the page.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "metrics.jsonl").write_text(
    ...     '{"stage": 0, "phase": "untrained", "eer": 38.0}'
    ... )
    >>> page = write_report([folder])
    >>> page.relative_to(folder).as_posix()
    'report/index.html'
    >>> "<td>38.0</td>" in page.read_text()
    True
    """
    runs = [Results(folder) for folder in folders]
    if len(runs) == 1:
        (data,) = runs
        folder, title = data.folder / "report", f"Run {data.name}"
        parts = (sections.overview, *sections.SECTIONS)
    else:
        data = runs
        folder = runs[0].folder / "report" / "comparison"
        title = f"Comparison of {len(runs)} runs"
        parts = comparison.SECTIONS
    page = Page(folder, f"{title}: loss-gated learning")
    for part in parts:
        page.add(part, data)
    now = datetime.datetime.now().astimezone()
    command = " ".join(["lgl report", *map(str, folders)])
    return page.write(
        f"Written on {now:%Y-%m-%d at %H:%M:%S %z}; again by: {command}"
    )
