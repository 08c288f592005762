"""A page of HTML in one file: sections, tables, figures.

All text is escaped here and nowhere else. The page holds its figures and its
style; a policy in its head keeps the browser from loading anything.
"""

import base64
import html

from lgl_plugin.report import figures
from lgl_plugin.utils.files import atomic_write

STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #fff; color: #1a1a1a; line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
header, main, footer { max-width: 80rem; margin: 0 auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 1.5rem 0 .5rem;
  overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 0; border-bottom: 2px solid #0072b2; }
p, li { max-width: 50rem; overflow-wrap: anywhere; }
p { margin: 0; }
a { color: #00507d; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .5rem 0;
  padding: 0; list-style: none; }
nav a { display: inline-block; padding: .3rem 0; }
section { display: grid; gap: 1rem; margin: 2rem 0; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
section > * { min-width: 0; margin: 0; }
section > h2, section > p, section > ul, section > dl, section > details,
section > .wide { grid-column: 1 / -1; }
dl { display: grid; gap: .5rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); }
dl div { background: #f2f5f8; padding: .5rem .7rem; }
dt { font-size: .85rem; color: #444; }
dd { margin: 0; font-size: 1.15rem; font-weight: 600;
  overflow-wrap: anywhere; }
figure { margin: 0; }
figure img { display: block; width: 100%; max-width: 34rem; height: auto; }
figcaption, caption { font-size: .9rem; color: #444; text-align: left;
  padding: .2rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .45rem; border-bottom: 1px solid #d5dbe0;
  text-align: right; vertical-align: top; }
thead th { border-bottom: 2px solid #8795a1; vertical-align: bottom; }
th:first-child { text-align: left; }
thead tr.groups th { text-align: center; border-bottom-width: 1px; }
tbody th { text-align: left; font-weight: 400; min-width: 5.5rem; }
table.figures td { white-space: pre; }
table.words th, table.words td { text-align: left; overflow-wrap: anywhere; }
table.words tbody th { min-width: 8rem; }
details { border: 1px solid #d5dbe0; padding: .4rem .7rem; }
summary { cursor: pointer; }
pre { overflow-x: auto; font-size: .8rem; }
footer { padding-bottom: 2rem; font-size: .9rem; color: #444; }
"""


class Page:
    """A page in the making, and the folder that it and its figures go to.

    Arguments
    ---------
    folder : pathlib.Path
        Gets `index.html`, and each figure as PNG and SVG.
    title : str
        What the page is of.

    Example
    -------
    >>> page = Page(getfixture("tmp_path") / "report", "Run <1>")
    >>> page.section("Journey")
    >>> page.table("What it cost", ["phase", "minutes"], [["Stage I", "1.5"]])
    >>> text = page.write("by hand").read_text()
    >>> "<h1>Run &lt;1&gt;</h1>" in text, "<td>1.5</td>" in text
    (True, True)
    """

    def __init__(self, folder, title):
        self.folder = folder
        self.title = title
        self.introduction = []
        self.sections = {}
        self.parts = self.introduction
        self.failures = []

    def add(self, part, *data):
        """Adds a part, or the reason why it could not be made.

        Arguments
        ---------
        part : callable
            Takes the page and the data. One damaged file must not cost the
            page, nor the training that asks for it.
        """
        try:
            part(self, *data)
        except Exception as error:
            reason = f"{part.__name__}: {type(error).__name__}: {error}"
            self.failures.append(reason)
            self.paragraph(f"This part could not be made. {reason}")

    def section(self, title):
        """Begins a section, which all that follows belongs to."""
        self.parts = self.sections.setdefault(title, [])

    def paragraph(self, text):
        """Adds running text."""
        self.parts.append(f"<p>{html.escape(text)}</p>")

    def bullets(self, texts):
        """Adds a list."""
        items = "".join(f"<li>{html.escape(text)}</li>" for text in texts)
        self.parts.append(f"<ul>{items}</ul>")

    def facts(self, facts):
        """Adds a few figures to be seen first, from name to value."""
        items = "".join(
            f"<div><dt>{html.escape(name)}</dt>"
            f"<dd>{html.escape(str(value))}</dd></div>"
            for name, value in facts.items()
        )
        self.parts.append(f"<dl>{items}</dl>")

    def links(self, links):
        """Adds links to other pages, from text to relative address."""
        items = "".join(
            f'<li><a href="{html.escape(address)}">{html.escape(text)}</a></li>'
            for text, address in links.items()
        )
        self.parts.append(f"<ul>{items}</ul>")

    def table(self, caption, header, rows, groups=None, wide=False):
        """Adds a table of figures.

        Arguments
        ---------
        caption : str
            What it shows.
        header : list of str
            Of the columns; the first one names the rows.
        rows : list of list of str
            One cell per column.
        groups : dict, optional
            Names of groups of columns, after the first, and how many columns
            each has.
        wide : bool
            Whether it needs the width of the page.
        """
        table = _table(caption, header, rows, groups)
        self.parts.append(_scrolling(table, caption, wide))

    def words(self, caption, header, rows):
        """Adds a table of words, as wide as the page."""
        table = _table(caption, header, rows, style="words")
        self.parts.append(_scrolling(table, caption, wide=True))

    def folded_table(self, summary, header, rows):
        """Adds a table of words that opens on demand."""
        table = _table(None, header, rows, style="words")
        self.parts.append(
            f"<details><summary>{html.escape(summary)}</summary>"
            f"{_scrolling(table, summary)}</details>"
        )

    def folded_text(self, summary, text):
        """Adds text as it is, which opens on demand."""
        self.parts.append(
            f"<details><summary>{html.escape(summary)}</summary>"
            f'<pre tabindex="0">{html.escape(text)}</pre></details>'
        )

    def figure(self, name, figure, alt, caption, raster=False):
        """Saves a figure as PNG and SVG and shows it.

        Arguments
        ---------
        name : str
            Of the files, without extension.
        figure : matplotlib.figure.Figure
            See `figures`.
        alt : str
            What one sees in it, for those who do not.
        caption : str
            What it is.
        raster : bool
            Show the PNG: the smaller one where there are thousands of points.
        """
        png, svg = figures.save(figure, self.folder, name)
        kind, data = ("png", png) if raster else ("svg+xml", svg)
        width, height = (round(96 * inch) for inch in figure.get_size_inches())
        self.parts.append(
            f'<figure><img alt="{html.escape(alt)}" '
            f'width="{width}" height="{height}" '
            f'src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )

    def write(self, footer):
        """Writes the page and returns its path."""
        entries, sections = [], []
        for number, (title, parts) in enumerate(self.sections.items(), 1):
            title = html.escape(title)
            entries.append(f'<li><a href="#s{number}">{title}</a></li>')
            sections.append(
                f'<section id="s{number}" aria-labelledby="h{number}">'
                f'<h2 id="h{number}">{title}</h2>\n'
                + "\n".join(parts)
                + "\n</section>"
            )
        policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
        lines = [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" '
            'content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            f"<title>{html.escape(self.title)}</title>",
            f"<style>{STYLE}</style>\n</head>\n<body>\n<header>",
            f"<h1>{html.escape(self.title)}</h1>",
            *self.introduction,
            f'<nav aria-label="Sections"><ul>{"".join(entries)}</ul></nav>',
            "</header>\n<main>",
            *sections,
            f"</main>\n<footer><p>{html.escape(footer)}</p></footer>",
            "</body>\n</html>",
        ]
        path = self.folder / "index.html"
        with atomic_write(path) as out:
            out.write("\n".join(lines) + "\n")
        return path


def _scrolling(table, label, wide=False):
    """A table that scrolls by itself where the screen is narrow."""
    style = "scroll wide" if wide else "scroll"
    return (
        f'<div class="{style}" role="region" tabindex="0" '
        f'aria-label="{html.escape(label)}">{table}</div>'
    )


def _table(caption, header, rows, groups=None, style="figures"):
    """A table's HTML."""
    lines = [f'<table class="{style}">']
    if caption is not None:
        lines.append(f"<caption>{html.escape(caption)}</caption>")
    lines.append("<thead>")
    if groups:
        cells = "".join(
            f'<th scope="colgroup" colspan="{span}">{html.escape(name)}</th>'
            for name, span in groups.items()
        )
        lines.append(f'<tr class="groups"><td></td>{cells}</tr>')
    cells = [f'<th scope="col">{html.escape(name)}</th>' for name in header]
    lines.append(f"<tr>{''.join(cells)}</tr>\n</thead>\n<tbody>")
    for first, *others in rows:
        cells = [f'<th scope="row">{html.escape(str(first))}</th>']
        cells += [f"<td>{html.escape(str(other))}</td>" for other in others]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    lines.append("</tbody>\n</table>")
    return "\n".join(lines)
