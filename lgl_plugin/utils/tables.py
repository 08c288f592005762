"""Tables in Markdown and as csv."""

import csv
import pathlib
from collections.abc import Iterable, Sequence

from lgl_plugin.utils.files import atomic_write


def markdown_table(header: Sequence, rows: Iterable[Sequence]) -> str:
    """Returns a Markdown table; cells become text and are not escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def write_csv(path: str | pathlib.Path, rows: Iterable[Sequence]) -> None:
    """Writes rows, of which the first is the header, atomically."""
    with atomic_write(path) as out:
        csv.writer(out, lineterminator="\n").writerows(rows)
