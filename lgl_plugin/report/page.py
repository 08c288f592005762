"""Writes a report's page from plain data, with the template page.html.

The page embeds its figures and style, and loads nothing except a recording
that is played. jinja2 escapes all text, because names of runs, files, speakers
and settings are not trusted.
"""

import base64
import datetime
import pathlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
from matplotlib.figure import Figure as Drawing
from speechbrain.utils.logger import get_logger

from lgl_plugin.report import figures
from lgl_plugin.utils.files import FULL, atomic_write

logger = get_logger(__name__)


@dataclass
class Summary:
    """A sentence that sums up a run, in the colour of a good or bad state."""

    good: bool
    text: str


@dataclass
class Command:
    """A command to copy, and the reason to type it."""

    reason: str
    text: str


@dataclass
class Table:
    """A table whose first column names the rows.

    `groups` are headings over the other columns, with their widths in columns.
    With `prose`, cells may break into lines. A `folded` table opens on demand.
    """

    caption: str
    header: Sequence[str]
    rows: Iterable[Sequence]
    groups: dict[str, int] = field(default_factory=dict)
    prose: bool = False
    folded: bool = False


@dataclass
class Recordings:
    """Groups of recordings, each of which opens on demand.

    `groups` maps a group's name to (recording, address). The address is empty
    if the page may not play the recording.
    """

    caption: str
    groups: dict[str, list[tuple[str, str]]]


@dataclass
class Links:
    """Links to other pages, from text to relative address."""

    addresses: dict[str, str]


@dataclass
class Figure:
    """A drawing to be saved as `name`; `raster` shows the PNG, not the SVG.

    For thousands of points the PNG is smaller.
    """

    name: str
    drawing: Drawing
    alt: str
    caption: str
    raster: bool = False
    data: str = ""  # media type and base64 code, set by `save`

    def save(self, folder: pathlib.Path) -> None:
        """Writes the drawing as PNG and SVG and embeds one of them."""
        png, svg = figures.save(self.drawing, folder, self.name)
        kind, data = ("png", png) if self.raster else ("svg+xml", svg)
        self.data = f"{kind};base64,{base64.b64encode(data).decode()}"


# A paragraph, a list, a few facts from name to value, or one of the above.
Block = (str | list | dict) | (
    Summary | Command | Table | Recordings | Links | Figure
)


class Page:
    """A page to be written, and the folder for the page and its figures."""

    def __init__(self, folder: pathlib.Path, title: str):
        self.folder = folder
        self.title = title
        self.failures: list[str] = []

    def collect(self, part: Callable[..., Iterable[Block]], *data: Any) -> list:
        """Returns the blocks that a part yields, its figures saved.

        If the part raises an error, the reason becomes its last block, and is
        added to `failures`. Only a full disk raises an error.
        """
        blocks = []
        # One damaged file must stop neither the page nor the training, which
        # writes the page after each round.
        try:
            for block in part(*data):
                if isinstance(block, Figure):
                    block.save(self.folder)
                blocks.append(block)
        except Exception as error:
            # Raised: a page without its figures would look finished.
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            reason = f"{part.__name__}: {type(error).__name__}: {error}"
            self.failures.append(reason)
            logger.warning("A part of the page could not be made. %s", reason)
            logger.debug("The error in full:", exc_info=True)
            blocks.append(f"This part could not be made. {reason}")
        return blocks

    def write(
        self, introduction: list, sections: dict[str, list], command: str
    ) -> pathlib.Path:
        """Writes `index.html` from collected blocks and returns its path.

        Sections without a block are left out. `command` is the command that
        writes the page.
        """
        now = datetime.datetime.now().astimezone()
        return render(
            "page.html",
            self.folder / "index.html",
            title=self.title,
            introduction=introduction,
            sections={title: part for title, part in sections.items() if part},
            footer=f"Written on {now:%Y-%m-%d at %H:%M:%S %z} by {command}",
        )


def render(template: str, path: pathlib.Path, **values: Any) -> pathlib.Path:
    """Writes a page from a template of this folder and returns its path."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    with atomic_write(path) as out:
        out.write(environment.get_template(template).render(**values))
    return path
