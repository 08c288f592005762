"""Draws the chart of docs/paper_claims.md from the figures of its Table 1.

> python docs/claims_figure.py
"""

import pathlib
import re

from matplotlib.figure import Figure

from lgl_plugin.report.figures import GREY, style

HERE = pathlib.Path(__file__).parent
# A figure of the table: 13.8 (11.3 to 16.8).
FIGURE = re.compile(r"([\d.]+) \(([\d.]+) to ([\d.]+)\)")


def table1(page):
    """Reads Table 1: its phases, and (mean, lowest, highest) by corpus."""
    _, _, section = page.partition("\n## Table 1: stages\n")
    rows = [
        line.split(" | ")
        for line in section.strip().split("\n\n")[0].split("\n")
    ]
    phases = [name.strip("| ") for name in rows[0][1:]]
    figures = {
        row[0].strip("| "): [
            tuple(map(float, FIGURE.search(cell).groups())) for cell in row[1:]
        ]
        for row in rows[2:]
    }
    return phases, figures


def draw(folder):
    """Writes the chart as PNG into a folder."""
    phases, figures = table1((HERE / "paper_claims.md").read_text("utf-8"))
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    panels = figure.subplots(1, len(figures), sharey=True)
    for index, (panel, (corpus, points)) in enumerate(
        zip(panels, figures.items())
    ):
        (baseline, *_), *points = points
        means, lowest, highest = zip(*points)
        errors = [
            [mean - low for mean, low in zip(means, lowest)],
            [high - mean for mean, high in zip(means, highest)],
        ]
        # No line: the phases with and without the gate are alternatives.
        look = {**style(index), "linestyle": "none"}
        panel.errorbar(range(len(means)), means, errors, capsize=4, **look)
        for x, mean in enumerate(means):
            panel.annotate(
                f"{mean:.1f}",
                (x, mean),
                xytext=(6, 6),
                textcoords="offset points",
                fontsize=8,
            )
        panel.axhline(baseline, color=GREY, ls=":", label=phases[0])
        panel.set_title(corpus, fontsize=10)
        names = [name.replace(" with", "\nwith") for name in phases[1:]]
        panel.set_xticks(range(len(names)), names, fontsize=7.5)
        panel.set_xlim(-0.4, len(names) - 0.4)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8, loc="lower left")
    panels[0].set_ylabel("EER (%)")
    panels[0].set_ylim(bottom=0)  # last: the limits of all panels are fixed
    figure.savefig(pathlib.Path(folder) / "stages_eer.png", dpi=110)


if __name__ == "__main__":
    draw(HERE / "images")
