"""Draws the curves of docs/healthy.md from reference_curves.json.

> python docs/reference_curves.py

The figures in that file are from the metrics.jsonl of two runs, whose commands
the page gives.
"""

import json
import pathlib

from lgl_plugin.report.figures import epochs

HERE = pathlib.Path(__file__).parent
STAGE1 = {
    "accuracy": "accuracy",
    "contrastive_accuracy": "accuracy, held-out",
    "discriminator_accuracy": "discriminator",
}
STAGE2 = {
    "accuracy": "accuracy",
    "selected_share": "selected",
    "corrected_share": "corrected",
}
ERROR = {"pseudo_eer": "EER"}
# Of each figure: which run, which of its records' keys, the axis, its factor.
FIGURES = {
    "stage1_loss": ("stage1", {"loss": "loss"}, "training loss", 1),
    "stage1_accuracy": ("stage1", STAGE1, "%", 100),
    "stage1_pseudo_eer": ("stage1", ERROR, "EER of pseudo-trials (%)", 1),
    "stage2_loss": ("stage2", {"loss": "loss"}, "training loss", 1),
    "stage2_accuracy": ("stage2", STAGE2, "%", 100),
    "stage2_pseudo_eer": ("stage2", ERROR, "EER of pseudo-trials (%)", 1),
}


def draw(folder):
    """Writes all figures as PNG into a folder."""
    runs = json.loads((HERE / "reference_curves.json").read_text("utf-8"))
    for name, (run, keys, label, factor) in FIGURES.items():
        figure = epochs(runs[run], keys, label, factor, bottom=0)
        figure.savefig(pathlib.Path(folder) / f"{name}.png", dpi=100)


if __name__ == "__main__":
    draw(HERE / "images")
